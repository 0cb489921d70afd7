"""Memory that ONNX Runtime reads and writes in place, on the engine's device."""

import math
import mmap
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from uhd_export.runtime.engines.device import Device


@dataclass(frozen=True)
class Buffer:
    """A tensor on `device`, or rows of one from `first` on; `memory` holds all of it, and keeps it alive."""

    memory: ort.OrtValue
    device: Device
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    first: int = 0

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype: np.dtype[Any], device: Device) -> Self:
        """A new one."""
        if device.kind == "cpu":
            # Memory from the system is zero, and there only from the first write on, page by page: a cache
            # costs what has been used of it. Not so `np.zeros`, which asks for huge pages, each as long as a
            # head's 4096 positions. The value borrows the array's memory and keeps the array, as that does
            # the mapping.
            pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
            memory = ort.OrtValue.ortvalue_from_numpy(np.frombuffer(pages, dtype).reshape(shape))
        else:
            memory = ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, device.kind, device.number)
            memory.update_inplace(np.zeros(shape, dtype))
        return cls(memory, device, dtype, shape)

    @classmethod
    def of(cls, array: NDArray[Any], device: Device) -> Self:
        """A copy of `array`."""
        memory = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), device.kind, device.number)
        return cls(memory, device, array.dtype, array.shape)

    @property
    def nbytes(self) -> int:
        """Size of the rows that are meant."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def place(self) -> tuple[str, int, np.dtype[Any], tuple[int, ...], int]:
        """As IOBinding takes it: device and its number, type, shape, address."""
        offset = self.first * math.prod(self.shape[1:]) * self.dtype.itemsize
        address = self.memory.data_ptr() + offset
        return self.device.kind, self.device.number, self.dtype, self.shape, address

    def rows(self, start: int, stop: int) -> "Buffer":
        """Rows `start` to `stop` of the first axis, in the same memory."""
        shape = (stop - start, *self.shape[1:])
        return Buffer(self.memory, self.device, self.dtype, shape, self.first + start)

    def read(self) -> NDArray[Any]:
        """A copy in this machine's memory."""
        return np.array(self.memory.numpy()[self.first : self.first + self.shape[0]])
