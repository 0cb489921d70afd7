"""Kernels that TensorRT-RTX compiles on the device, kept on disk so that the next start is quick."""

from contextlib import suppress
from types import ModuleType
from typing import Any

from uhd_export.runtime.engines.tensorrt.backend import messages
from uhd_export.runtime.engines.tensorrt.cuda import Cuda
from uhd_export.runtime.engines.tensorrt.record import EngineRecord
from uhd_export.runtime.files import cache_folder, write_file


class JitCache:
    """The runtime cache of one engine on one kind of GPU. TensorRT itself refuses one that does not fit."""

    def __init__(self, trt: ModuleType, engine: Any, record: EngineRecord, cuda: Cuda) -> None:
        self.handle: Any = None
        self._path = cache_folder() / "jit" / f"{record.sha256[:32]}-{cuda.capability}.bin"
        if not hasattr(trt, "IRuntimeCache"):  # TensorRT compiles at build time
            return
        self.handle = engine.create_runtime_config().create_runtime_cache()
        with suppress(OSError), messages(trt):  # none is kept, or it cannot be read
            self.handle.deserialize(self._path.read_bytes())

    def save(self) -> None:
        """Write what was compiled; a cache that cannot be written is left out."""
        if self.handle is None:
            return
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_file(self._path, memoryview(self.handle.serialize()))
