"""What a run of ONNX Runtime reads and writes where, bound once through IOBinding."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from uhd_export.runtime.engines.base import Array, TensorInfo
from uhd_export.runtime.engines.buffers import Buffer


class Fetch:
    """An IOBinding of the shared buffers and of the outputs that are `wanted`; the others are not copied."""

    def __init__(
        self,
        session: ort.InferenceSession,
        shared: Mapping[str, str],
        buffers: Mapping[str, Buffer],
        wanted: Mapping[str, TensorInfo],
        sizes: Mapping[str, int],
    ) -> None:
        self._session, self._binding = session, session.io_binding()
        for past, present in shared.items():
            self._binding.bind_input(past, *buffers[past].place)
            self._binding.bind_output(present, *buffers[past].place)
        # Outputs of known shape are bound once too, to host memory.
        self._results: dict[str, ort.OrtValue] = {}
        self._free: list[str] = []
        for name, info in wanted.items():
            if any(isinstance(d, str) and d not in sizes for d in info.shape):
                self._free.append(name)
            else:
                result = ort.OrtValue.ortvalue_from_shape_and_type(info.resolve(sizes), info.dtype)
                self._results[name] = result
                self._binding.bind_ortvalue_output(name, result)

    def feed(self, feeds: Mapping[str, Array]) -> None:
        """Bind what the next run reads."""
        for name, array in feeds.items():
            if isinstance(array, Buffer):
                self._binding.bind_input(name, *array.place)
            else:
                self._binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name in self._free:  # anew each time, since the shape may change
            self._binding.bind_output(name, "cpu")

    def run(self, options: ort.RunOptions) -> None:
        """Run once; what comes after all that is fetched is not computed."""
        options.only_execute_path_to_fetches = True
        self._session.run_with_iobinding(self._binding, options)

    def results(self) -> dict[str, NDArray[Any]]:
        """Copies of what the last run gave."""
        results = dict(self._results)
        if self._free:  # bound last, so they are the last outputs
            values = self._binding.get_outputs()[-len(self._free) :]
            results.update(zip(self._free, values, strict=True))
        # On the CPU `numpy` only borrows the memory, which the next run overwrites.
        return {name: value.numpy().copy() for name, value in results.items()}
