"""Kernels that TensorRT-RTX compiles on the device, kept on disk so that the next start is quick."""

import os
from types import ModuleType
from typing import Any

from uhd_export.runtime.engines.tensorrt.backend import cache_folder, messages
from uhd_export.runtime.engines.tensorrt.cuda import Cuda
from uhd_export.runtime.engines.tensorrt.record import EngineRecord


class JitCache:
    """The runtime cache of one engine on one kind of GPU. TensorRT itself refuses one that does not fit."""

    def __init__(self, trt: ModuleType, engine: Any, record: EngineRecord, cuda: Cuda) -> None:
        self.handle: Any = None
        self._path = cache_folder() / "jit" / f"{record.sha256[:32]}-{cuda.capability}.bin"
        if not hasattr(trt, "IRuntimeCache"):  # TensorRT compiles at build time
            return
        self.handle = engine.create_runtime_config().create_runtime_cache()
        if self._path.is_file():
            with messages(trt):
                self.handle.deserialize(self._path.read_bytes())

    def save(self) -> None:
        """Write what was compiled; a cache that cannot be written is left out."""
        if self.handle is None:
            return
        temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}.partial")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(memoryview(self.handle.serialize()))
            temporary.replace(self._path)
        except OSError:
            temporary.unlink(missing_ok=True)
