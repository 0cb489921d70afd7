"""ONNX Runtime as an engine, on the CPU or a CUDA device."""

import math
import mmap
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort

from uhd_export.runtime.engines.base import Binding, Engine, TensorInfo, check_feeds
from uhd_export.runtime.errors import UhdError

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(bool)": np.bool_,
}


class OrtEngine(Engine):
    """A graph in an ONNX Runtime session; see `Engine`.

    `arena` keeps freed CPU memory for the next call, which is faster where shapes repeat; without it peak
    memory follows what the graph needs. `profile` is a path prefix: `end_profile` returns the trace's path.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: str = "cpu",
        threads: int | None = None,
        arena: bool = True,
        profile: str | Path | None = None,
    ) -> None:
        if device not in _PROVIDERS:
            raise UhdError(f"device {device!r}: unknown; use one of {', '.join(_PROVIDERS)}")
        if _PROVIDERS[device] not in ort.get_available_providers():
            raise UhdError(
                f"device {device}: this ONNX Runtime has no {_PROVIDERS[device]}; pip install onnxruntime-gpu"
            )
        if not Path(path).is_file():
            raise UhdError(f"engine {path}: no such file")
        self.path, self.device = Path(path), device
        options = ort.SessionOptions()
        options.enable_cpu_mem_arena = arena
        # Else the second run with some shapes takes one block for all that the first held at a time, which is
        # larger than what the arena has, and is kept for every shape: half as much memory again, no faster.
        options.enable_mem_pattern = False
        options.log_severity_level = 3
        # Graphs for other backends hold DequantizeLinear: no rounding of activations where it is fused.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        # The CPU runs whatever the device's provider does not, such as shape arithmetic.
        providers = dict.fromkeys([_PROVIDERS[device], _PROVIDERS["cpu"]])
        try:
            self.session = ort.InferenceSession(str(path), options, providers=list(providers))
        except Exception as error:  # the binding's exceptions have no common base but this
            reason = str(error).splitlines()[0]
            raise UhdError(f"engine {path}: ONNX Runtime cannot load it ({reason}); build it again") from None
        if device != "cpu" and _PROVIDERS[device] not in self.session.get_providers():
            raise UhdError(
                f"device {device}: ONNX Runtime cannot use it; check the driver and CUDA libraries"
            )
        self.inputs = {i.name: _describe(i) for i in self.session.get_inputs()}
        self.outputs = {o.name: _describe(o) for o in self.session.get_outputs()}
        files = [self.path, self.path.with_name(f"{self.path.name}.data")]
        self.weight_bytes = sum(file.stat().st_size for file in files if file.is_file())

    def infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Engine.infer`."""
        check_feeds(feeds, self.inputs, {})
        results = self.session.run(None, dict(feeds))
        return dict(zip(self.outputs, results, strict=True))

    def bind(self, shared: Mapping[str, str], sizes: Mapping[str, int]) -> "OrtBinding":
        """See `Engine.bind`."""
        return OrtBinding(self, shared, sizes)

    def end_profile(self) -> Path:
        """Stop profiling; the path of the JSON trace (Chrome trace events, microseconds)."""
        return Path(self.session.end_profiling())

    def close(self) -> None:
        """Free the session. May be repeated."""
        if hasattr(self, "session"):
            del self.session


class OrtBinding(Binding):
    """Buffers of an `OrtEngine` bound once through IOBinding."""

    def __init__(self, engine: OrtEngine, shared: Mapping[str, str], sizes: Mapping[str, int]) -> None:
        self._engine, self._shared = engine, dict(shared)
        self._binding = engine.session.io_binding()
        self._buffers: dict[str, ort.OrtValue] = {}
        self.nbytes = 0
        for past, present in shared.items():
            info = engine.inputs[past]
            shape = info.resolve(sizes)
            buffer = _zeros(shape, info.dtype, engine.device)
            self.nbytes += math.prod(shape) * info.dtype.itemsize
            self._buffers[past] = buffer
            self._binding.bind_ortvalue_input(past, buffer)
            self._binding.bind_ortvalue_output(present, buffer)
        # Outputs of known shape are bound once too, to host memory.
        self._results: dict[str, ort.OrtValue] = {}
        self._free: list[str] = []
        for name in engine.outputs.keys() - set(shared.values()):
            info = engine.outputs[name]
            if any(isinstance(d, str) for d in info.shape):
                self._free.append(name)
            else:
                result = ort.OrtValue.ortvalue_from_shape_and_type(info.shape, info.dtype)
                self._results[name] = result
                self._binding.bind_ortvalue_output(name, result)

    def infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Binding.infer`."""
        check_feeds(feeds, self._engine.inputs, self._shared)
        for name, array in feeds.items():
            self._binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name in self._free:  # anew each time, since the shape may change
            self._binding.bind_output(name, "cpu")
        self._engine.session.run_with_iobinding(self._binding)
        results = dict(self._results)
        if self._free:  # bound last, so they are the last outputs
            values = self._binding.get_outputs()[-len(self._free) :]
            results.update(zip(self._free, values, strict=True))
        # On the CPU `numpy` only borrows the memory, which the next run overwrites.
        return {name: value.numpy().copy() for name, value in results.items()}

    def read(self, name: str) -> np.ndarray:
        """See `Binding.read`."""
        return self._buffers[name].numpy().copy()


def _zeros(shape: tuple[int, ...], dtype: np.dtype, device: str) -> ort.OrtValue:
    """A buffer of zeros on `device`."""
    if device == "cpu":
        # Memory from the system is zero, and there only from the first write on, page by page: a cache costs
        # what has been used of it. Not so `np.zeros`, which asks for huge pages, each as long as a head's
        # 4096 positions. The value borrows the array's memory and keeps the array, as that does the mapping.
        pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
        return ort.OrtValue.ortvalue_from_numpy(np.frombuffer(pages, dtype).reshape(shape))
    buffer = ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, device)
    buffer.update_inplace(np.zeros(shape, dtype))
    return buffer


def _describe(value: ort.NodeArg) -> TensorInfo:
    shape = tuple(d if isinstance(d, int) else str(d) for d in value.shape)
    return TensorInfo(np.dtype(_TYPES[value.type]), shape)
