"""Ahead-of-time compilation of the kernels for GPUs that need not be there.

Results are kept in the cache folder, keyed by the kernels' source, the compiler's version and the request.
"""

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from uhd_export.plugins.launch import Launch
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.files import cache_folder, write_file

TARGETS = (80, 86, 87, 89, 90, 120)  # A100; RTX 30; Jetson Orin; RTX 40; H100 and H200; RTX 50
DTYPES = ("float16", "bfloat16", "float32")
FOLDER = Path(__file__).parent.parent


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel: what a driver needs to launch it, and what it uses."""

    name: str
    capability: int
    ptx: str
    shared: int  # bytes of dynamic shared memory
    warps: int
    nulls: int  # pointers that the compiler appends to the arguments; unused, hence null
    registers: int  # a thread
    spilled: int  # bytes a thread


@dataclass(frozen=True)
class Request:
    """One kernel for one target. Everything that the result depends on, save the source."""

    module: str
    kernel: str
    types: tuple[str, ...]  # of the tensors, in argument order
    integers: int
    constants: tuple[tuple[str, int | bool | str], ...]
    warps: int
    stages: int
    registers: int | None
    capability: int

    @classmethod
    def of(cls, op: str, launch: Launch, types: Mapping[str, str], capability: int) -> "Request":
        """The request for a `launch` of `op` ("jbu", "window_attention"), given its tensors' types."""
        return cls(
            module=f"uhd_export.plugins.{op}.kernel",
            kernel=launch.kernel,
            types=tuple(types[name] for name in launch.tensors),
            integers=len(launch.integers),
            constants=launch.constants,
            warps=launch.warps,
            stages=launch.stages,
            registers=launch.registers,
            capability=capability,
        )

    def key(self) -> str:
        """Name of the result in the cache."""
        sources = [FOLDER / name for name in ("tiles.py", "compile/worker.py")]
        sources.append(FOLDER / self.module.split(".")[2] / "kernel.py")
        parts = [json.dumps(asdict(self), sort_keys=True), triton_version()]
        parts += [hashlib.sha256(source.read_bytes()).hexdigest() for source in sources]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def triton_version() -> str:
    """The installed compiler's version; UhdError where there is none."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        raise UhdError(
            "triton: not installed, and kernels are compiled with it; pip install triton==3.7.1"
        ) from None


def compile_kernels(requests: Sequence[Request]) -> list[Kernel]:
    """Compile what the cache does not hold, a worker process per core; results in order.

    A cache that cannot be written is left out. Raises UhdError where Triton is missing or the compiler fails.
    """
    folder = cache_folder() / "kernels"
    paths = [folder / f"{request.key()}.json" for request in requests]
    missing = {path: request for path, request in zip(paths, requests, strict=True) if not path.is_file()}
    compiled: dict[Path, Kernel] = {}
    if missing:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        workers = min(os.cpu_count() or 1, len(missing))
        items = list(missing.items())
        with ThreadPoolExecutor(workers) as pool:
            for part in pool.map(_work, [items[i::workers] for i in range(workers)]):
                compiled |= part
    return [compiled.get(path) or Kernel(**json.loads(path.read_text(encoding="utf-8"))) for path in paths]


def _work(items: Sequence[tuple[Path, Request]]) -> dict[Path, Kernel]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_DISABLE_LINE_INFO"] = "1"
    command = [sys.executable, "-P", "-m", "uhd_export.plugins.compile.worker"]  # -P: not from this folder
    pipe, compiled = subprocess.PIPE, {}
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=environment) as worker,
    ):
        if worker.stdin is None or worker.stdout is None:
            raise RuntimeError("the worker has no pipes")
        for path, request in items:
            try:
                worker.stdin.write(json.dumps(asdict(request)) + "\n")
                worker.stdin.flush()
            except BrokenPipeError:
                pass  # it died: told below
            line = worker.stdout.readline()
            if not line:
                log.seek(0)
                last = (log.read().strip().splitlines() or ["no message"])[-1]
                raise UhdError(f"kernel {request.kernel} for sm_{request.capability}: not compiled: {last}")
            content = json.loads(line) | {"capability": request.capability}
            compiled[path] = Kernel(**content)
            with suppress(OSError):
                write_file(path, json.dumps(content))
        worker.stdin.close()
    return compiled
