"""What the machine can do at best, measured by the backend itself in a second or two.

One product of matrices, in ONNX Runtime: a square one is bound by arithmetic, a vector times a matrix larger
than the caches by memory, which is how a decoder's step reads its weights.
"""

import functools
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from uhd_export.runtime.engines.device import Device, parse_device
from uhd_export.runtime.engines.product import product
from uhd_export.runtime.engines.wheels import CUDA_PROVIDER, prepare_cuda
from uhd_export.runtime.errors import UhdError

_REPEATS = 4
# Sizes on a processor and on a GPU.
_SQUARE = {"cpu": 1536, "cuda": 8192}
_VECTOR = {"cpu": (4096, 16384), "cuda": (16384, 32768)}


@dataclass(frozen=True)
class Rates:
    """FLOPs and bytes a second, the best of a few runs; `how` says of what."""

    flops_per_second: float
    bytes_per_second: float
    how: str


@functools.cache
def measure_rates(backend: str, device: str, threads: int | None) -> Rates | None:
    """Of `device` with `threads`; None where ONNX Runtime, which measures them, is not what runs there."""
    if backend != "onnxruntime":
        return None
    place = parse_device(device)
    dtype = np.dtype(np.float32 if place.kind == "cpu" else np.float16)
    side, (inner, columns) = _SQUARE[place.kind], _VECTOR[place.kind]
    try:
        session = _session(place, dtype, threads)
        square = _best(session, place, dtype, side, side, side)
        vector = _best(session, place, dtype, 1, inner, columns)
    except (ImportError, UhdError, RuntimeError, MemoryError):
        return None
    return Rates(
        2 * side**3 / square,
        inner * columns * dtype.itemsize / vector,
        f"ONNX Runtime's {dtype} MatMul: {side} x {side} x {side}, and a vector times "
        f"{inner * columns * dtype.itemsize / 1e6:,.0f} MB",
    )


def _session(place: Device, dtype: np.dtype[Any], threads: int | None) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    providers: list[Any] = ["CPUExecutionProvider"]
    if place.kind != "cpu":
        prepare_cuda(ort)
        providers = [(CUDA_PROVIDER, {"device_id": str(place.number), "enable_cudnn": "0"})]
    return ort.InferenceSession(product(dtype), options, providers=providers)


def _best(session: Any, place: Device, dtype: np.dtype[Any], rows: int, inner: int, columns: int) -> float:
    """Seconds of the fastest of a few products, on tensors that stay on the device."""
    import onnxruntime as ort

    binding = session.io_binding()
    shapes = {"a": (rows, inner), "b": (inner, columns), "c": (rows, columns)}
    for name, shape in shapes.items():
        value = ort.OrtValue.ortvalue_from_numpy(np.full(shape, 0.5, dtype), place.kind, place.number)
        bind = binding.bind_ortvalue_output if name == "c" else binding.bind_ortvalue_input
        bind(name, value)
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
