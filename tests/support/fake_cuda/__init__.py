"""A CUDA that computes nothing, under the real CUDA provider of ONNX Runtime.

`load()` compiles the C files of this folder once, and loads them under the names that the provider links to.
It must come before the first session. Kernels do nothing and are counted by name; memory and copies are real.
So placement, launches, copies and synchronisations are those of a GPU, and numbers are not.
"""

import ctypes
import functools
import hashlib
import importlib.util
import os
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDER = Path(__file__).parent
# Name that the provider links to: source. In an order in which each finds those before it.
LIBRARIES = {
    "libcudart.so.13": "runtime.c",
    "libcublas.so.13": "cublas.c",
    "libcublasLt.so.13": "cublaslt.c",
    "libcurand.so.10": "curand.c",
    "libcuda.so.1": "driver.c",
}
# The provider asks for these names in versions called as the library.
_VERSIONED = ("libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13")


# As in counters.h.
_COUNTED = ["launches", "syncs", "event_syncs", "h2d", "d2h", "d2d", "h2d_bytes", "d2h_bytes", "d2d_bytes"]
_COUNTED += ["allocations", "frees", "allocated_bytes", "pinned"]


class _Counters(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_long) for name in _COUNTED)


class FakeCuda:
    """The loaded libraries, and what they counted."""

    def __init__(self, folder: Path) -> None:
        loaded = [ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL) for name in LIBRARIES]
        self._runtime = loaded[0]
        self._runtime.fake_counters.restype = ctypes.POINTER(_Counters)
        self._runtime.fake_log.argtypes = [ctypes.c_char_p]
        self._runtime.fake_allocated.restype = ctypes.c_long
        self._runtime.fake_device_of.argtypes = [ctypes.c_void_p]
        self._counters = self._runtime.fake_counters().contents

    def counts(self) -> Counter[str]:
        """Everything counted since the start."""
        return Counter({name: getattr(self._counters, name) for name, _ in _Counters._fields_})

    @contextmanager
    def counting(self) -> Iterator[Counter[str]]:
        """What is counted in the block, there when it ends."""
        counts, before = Counter(), self.counts()
        yield counts
        counts.update(self.counts() - before)

    @contextmanager
    def logging(self) -> Iterator[list[str]]:
        """One line for each launch, copy, allocation and synchronisation in the block, there when it ends."""
        lines: list[str] = []
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "log"
            self._runtime.fake_log(str(path).encode())
            try:
                yield lines
            finally:
                self._runtime.fake_log(None)
            lines.extend(path.read_text().splitlines())

    @contextmanager
    def observing(self, call: Callable[[str], None]) -> Iterator[None]:
        """`call(name)` at each launch in the block, in the place of what the kernel would do."""
        kind = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
        observer = kind(lambda name: call(name.decode()))
        self._runtime.fake_observe(observer)
        try:
            yield
        finally:
            self._runtime.fake_observe(kind())

    def allocated(self, device: int) -> int:
        """Bytes that are allocated on `device`."""
        return self._runtime.fake_allocated(device)

    def device_of(self, address: int) -> int:
        """The device whose memory holds `address`, -1 for the host's."""
        return self._runtime.fake_device_of(address)


def include_folder() -> Path:
    """The headers of CUDA 13, of the wheel nvidia-cuda-runtime."""
    found = importlib.util.find_spec("nvidia.cu13")
    folders = [Path(place) / "include" for place in (found.submodule_search_locations if found else ())]
    return next(folder for folder in folders if (folder / "cuda_runtime_api.h").is_file())


def build(folder: Path, names: tuple[str, ...] = tuple(LIBRARIES)) -> Path:
    """Compile the libraries `names` into `folder`; only the runtime and what uses it need the headers."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        target = folder / name
        command = ["gcc", "-shared", "-fPIC", "-O1", "-w", f"-Wl,-soname,{name}", "-o", f"{target}.partial"]
        if LIBRARIES[name] == "runtime.c":
            command.append(f"-I{include_folder()}")
        if name in _VERSIONED:
            script = folder / f"{name}.map"
            script.write_text(f"{name} {{ global: *; }};\n")
            command.append(f"-Wl,--version-script={script}")
        subprocess.run([*command, str(FOLDER / LIBRARIES[name]), "-ldl"], check=True)
        os.replace(f"{target}.partial", target)
    return folder


@functools.cache
def load() -> FakeCuda:
    """The libraries, compiled where that has not been done, in this process for good."""
    sources = b"".join(path.read_bytes() for path in sorted(FOLDER.glob("*.[ch]")))
    digest = hashlib.sha256(sources).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"uhd-export-fake-cuda-{os.getuid()}-{digest}"
    if not all((folder / name).exists() for name in LIBRARIES):
        build(folder)
    return FakeCuda(folder)
