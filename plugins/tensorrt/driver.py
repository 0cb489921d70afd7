"""The lowest seam to the GPU driver: loading compiled kernels and launching them, through cuda-python.

Everything above works with plain integers (device addresses, stream and function handles), so that
tests replace this one class.
"""

import ctypes
import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from uhd_export.runtime.engines.tensorrt.cuda import INSTALL
from uhd_export.runtime.errors import UhdError


class Driver:
    """The CUDA driver, in the context that is current in the calling thread."""

    def __init__(self) -> None:
        self._api = _import_driver()
        try:
            self._call("cuInit", 0)
        except RuntimeError as error:  # libcuda itself is not there
            raise UhdError(f"GPU: no NVIDIA driver ({error}); install one") from None

    def capability(self) -> int:
        """Compute capability of the current device, as 89."""
        names = self._api.CUdevice_attribute
        device = self._call("cuCtxGetDevice")
        major, minor = (
            self._call(
                "cuDeviceGetAttribute",
                getattr(names, f"CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{part}"),
                device,
            )
            for part in ("MAJOR", "MINOR")
        )
        return 10 * major + minor

    def context(self) -> int:
        """Handle of the current context: functions belong to it."""
        return int(self._call("cuCtxGetCurrent"))

    def load(self, ptx: str, name: str, shared: int) -> Any:
        """The function `name` of a PTX module, allowed to use `shared` bytes of dynamic shared memory.

        The driver compiles PTX here, and keeps the result in its own cache between processes.
        """
        module = self._call("cuModuleLoadData", ptx.encode() + b"\0")
        function = self._call("cuModuleGetFunction", module, name.encode())
        attribute = self._api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._call("cuFuncSetAttribute", function, attribute, shared)
        return function

    def launch(
        self,
        function: Any,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        stream: int,
        pointers: Sequence[int],
        integers: Sequence[int],
        nulls: int,
    ) -> None:
        """Queue a launch. Arguments are `pointers`, then 32-bit `integers`, then `nulls` null pointers."""
        values = (*pointers, *integers, *[0] * nulls)
        kinds = (
            [ctypes.c_void_p] * len(pointers) + [ctypes.c_int32] * len(integers) + [ctypes.c_void_p] * nulls
        )
        arguments = (values, tuple(kinds))
        self._call("cuLaunchKernel", function, *grid, threads, 1, 1, shared, stream, arguments, 0)

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *results = getattr(self._api, name)(*arguments)
        codes = self._api.CUresult
        if status == codes.CUDA_ERROR_UNSUPPORTED_PTX_VERSION:
            raise UhdError("GPU: the driver is too old for the engine's kernels; update it (to CUDA 12.8's)")
        if status != codes.CUDA_SUCCESS:
            raise UhdError(
                f"GPU: {name} failed ({status.name}); build the engine again with this driver's GPU"
            )
        return results[0] if results else None


@functools.cache
def open_driver() -> Driver:
    """The driver, opened once a process."""
    return Driver()


def _import_driver() -> ModuleType:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise UhdError(f"GPU: cuda-python is not installed ({error}); {INSTALL}") from None
    return driver
