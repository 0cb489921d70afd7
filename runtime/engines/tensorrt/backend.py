"""The door to TensorRT and TensorRT-RTX, which share one Python API: lazy import, messages, versions.

Nothing of TensorRT is imported before `open_tensorrt` is called.
"""

import functools
import importlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from uhd_export.runtime.errors import UhdError

_LIBRARY = "libtensorrt_rtx.so"
# The first TensorRT with all operators of the language graph.
MINIMUM = (10, 15, 1)


@dataclass(frozen=True)
class Backend:
    """One of the two distributions of TensorRT."""

    name: str
    module: str
    install: str
    targets: bool
    """Builds for the compute capabilities it is told, without a GPU; else for the GPU at hand."""


BACKENDS = {
    b.name: b
    for b in (
        Backend("tensorrt-rtx", "tensorrt_rtx", "pip install 'uhd-export[tensorrt-rtx]'", True),
        Backend("tensorrt", "tensorrt", "pip install 'uhd-export[tensorrt]'", False),
    )
}


def describe_backend(backend: str) -> Backend:
    """The backend called `backend`; UhdError where there is none."""
    if backend not in BACKENDS:
        raise UhdError(f"backend {backend!r}: unknown; use one of {', '.join(BACKENDS)}")
    return BACKENDS[backend]


def open_tensorrt(backend: str) -> ModuleType:
    """Import TensorRT ("tensorrt-rtx" or "tensorrt") and make it safe for plugins.

    Raises UhdError, with the install line, where it is not installed or its libraries do not load.
    """
    about = describe_backend(backend)
    try:
        trt = importlib.import_module(about.module)
    except (ImportError, OSError) as error:  # OSError: the wheel is there, a library it needs is not
        raise UhdError(f"backend {backend}: not installed ({error}); {about.install}") from None
    if backend == "tensorrt-rtx":
        _link_library()
    else:
        _check_version(trt)
    return trt


def _check_version(trt: ModuleType) -> None:
    """Refuse a TensorRT that lacks operators of the language graph, whose parser would say little."""
    version = tuple(int(part) for part in re.findall(r"\d+", trt.__version__)[:3])
    if version < MINIMUM:
        raise UhdError(
            f"backend tensorrt: version {trt.__version__} has no RotaryEmbedding; "
            f"{'.'.join(map(str, MINIMUM))} or newer is needed (on a Jetson: JetPack 7.2 or newer)"
        )


def supported_capabilities(trt: ModuleType) -> dict[str, Any]:
    """Compute capabilities that this TensorRT builds for without a GPU, with its names for them."""
    members = getattr(trt, "ComputeCapability", None)
    if members is None:
        return {}
    targets = {name[2:]: value for name, value in members.__members__.items() if name.startswith("SM")}
    return {f"{digits[:-1]}.{digits[-1]}": value for digits, value in targets.items()}


@functools.cache
def _link_library() -> None:
    """Give the library the name under which it loads itself.

    From the first plugin node on, TensorRT-RTX looks for `libtensorrt_rtx.so`, while the wheel holds
    `libtensorrt_rtx.so.1` alone; not finding it, it ends the process (1.7.1). It searches its own folder.
    """
    try:
        package = importlib.import_module("tensorrt_rtx_libs")
    except ImportError:  # not from the wheel: installed with the library's names, or found by LD_LIBRARY_PATH
        return
    folder = Path(package.__path__[0])
    link = folder / _LIBRARY
    versions = sorted(folder.glob(f"{_LIBRARY}.*"))
    if link.exists() or not versions:
        return
    temporary = folder / f".{_LIBRARY}.{os.getpid()}"
    try:
        temporary.symlink_to(versions[-1].name)
        temporary.replace(link)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UhdError(
            f"backend tensorrt-rtx: {link} is needed for plugins and cannot be made ({error.strerror}); "
            f"run `ln -s {versions[-1].name} {link}` as the owner of that folder"
        ) from None


class Messages:
    """What TensorRT logged in a block: errors and warnings, the newest last."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []

    @property
    def reason(self) -> str:
        """The errors as one line, or "no reason given"."""
        lines = dict.fromkeys(_tidy(message) for message in self.errors)
        return "; ".join(lines) or "no reason given"


@functools.cache
def logger(trt: ModuleType) -> Any:
    """The process's one logger (TensorRT keeps the first it is given), with a list of `sinks`."""

    base = cast(type[Any], trt.ILogger)

    class Logger(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            base.__init__(self)
            self.sinks: list[Messages] = []

        def log(self, severity: Any, message: str) -> None:
            levels = trt.ILogger.Severity
            for sink in self.sinks:
                if severity in (levels.INTERNAL_ERROR, levels.ERROR):
                    sink.errors.append(message)
                elif severity == levels.WARNING:
                    sink.warnings.append(message)

    return Logger()


@contextmanager
def messages(trt: ModuleType) -> Iterator[Messages]:
    """Collect what is logged in the block; nothing is printed."""
    sink, log = Messages(), logger(trt)
    log.sinks.append(sink)
    try:
        yield sink
    finally:
        log.sinks.remove(sink)


# What TensorRT puts around the reason: who says it, an error class, and places in its own source.
_AROUND = re.compile(
    r"^(?:[\w:]+: )?Error Code \d+: [\w ]+\("  # who says it
    r"|\[[\w.]+:\d+:? ?\w*\] ?|\bMyelinCheckException: |\.? In \w+ at /_src/[^ ]*"  # where
)


def _tidy(message: str) -> str:
    """The reason alone, on one line."""
    return _AROUND.sub("", " ".join(message.split())).removesuffix(")")
