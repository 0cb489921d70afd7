"""The backends by name, and the door to them."""

import importlib
import os
from collections.abc import Callable
from pathlib import Path

from uhd_export.runtime.engines.base import Engine
from uhd_export.runtime.errors import UhdError

_TENSORRT = "uhd_export.runtime.engines.tensorrt.engine"
_INSTALL_ORT = "pip install 'uhd-export[cpu]', or 'uhd-export[cuda]' for an NVIDIA GPU"
# Backend name: the module to import, its engine class, the device by default, and what to install where
# the import fails.
_BACKENDS = {
    "onnxruntime": ("uhd_export.runtime.engines.onnxruntime", "OrtEngine", "cpu", _INSTALL_ORT),
    "tensorrt-rtx": (_TENSORRT, "TensorrtEngine", "cuda", "pip install 'uhd-export[tensorrt-rtx]'"),
    "tensorrt": (_TENSORRT, "TensorrtEngine", "cuda", "pip install 'uhd-export[tensorrt]'"),
}


def default_device(backend: str) -> str:
    """The device on which `backend` runs where nobody says: "cpu" or "cuda"."""
    return _BACKENDS[backend][2] if backend in _BACKENDS else "cpu"


def open_engine(
    path: str | Path,
    backend: str = "onnxruntime",
    *,
    device: str | None = None,
    threads: int | None = None,
    profile: str | Path | None = None,
) -> Engine:
    """Load the graph at `path` with `backend` on `device`, "cpu" or "cuda" (default: as the backend does).

    `threads` limits the CPU threads (default: all cores); `profile` is where a trace of node times goes.
    Raises UhdError where the backend is unknown or not installed, `threads` is not above zero or more than
    the machine has cores, or the graph cannot be loaded.
    """
    if threads is not None and threads < 1:
        raise UhdError(f"threads {threads}: must be at least 1 (None means all cores)")
    cores = os.cpu_count() or 1
    if threads is not None and threads > cores:  # each takes memory, and time from the others
        raise UhdError(f"threads {threads}: this machine has {cores} cores; use at most as many")
    engine = engine_class(backend)
    device = device or default_device(backend)
    opened: Engine = engine(Path(path), device=device, threads=threads, profile=profile)
    return opened


def engine_class(backend: str) -> Callable[..., Engine]:
    """What opens a graph with `backend`. Raises UhdError where it is unknown or not installed."""
    if backend not in _BACKENDS:
        raise UhdError(f"backend {backend!r}: unknown; use one of {', '.join(_BACKENDS)}")
    module, name, _, install = _BACKENDS[backend]
    try:
        engine: Callable[..., Engine] = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise UhdError(f"backend {backend}: not installed ({error}); {install}") from None
    return engine
