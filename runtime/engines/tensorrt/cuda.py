"""The lowest seam to the GPU: the few CUDA calls that engines need, through cuda-python.

Everything above works with plain integers (device addresses, stream and graph handles), so that tests
replace this one class.
"""

import functools
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

from numpy.typing import NDArray

from uhd_export.runtime.errors import UhdError

INSTALL = "pip install cuda-python"


class Cuda:
    """One GPU, and one stream on which all work is queued in order."""

    def __init__(self, number: int = 0) -> None:
        self._api = _import_runtime()
        self.lock = threading.RLock()
        """Held while work is queued: threads share the stream, its scratch and what is captured of it."""
        self.number, self._thread = number, threading.local()
        self.waits = 0
        """How often `synchronize` was called: what was queued before is done."""
        count = self._first_call()
        if count < 1:
            raise UhdError("GPU: none is visible; check CUDA_VISIBLE_DEVICES")
        if number >= count:
            raise UhdError(f"device cuda:{number}: there is no such GPU; {count} visible, see nvidia-smi -L")
        properties = self._call("cudaGetDeviceProperties", number)
        self.name: str = properties.name.decode()
        self.capability: str = f"{properties.major}.{properties.minor}"
        self.memory: int = properties.totalGlobalMem
        flags = self._api.cudaStreamNonBlocking
        self.stream = int(self._call("cudaStreamCreateWithFlags", flags))

    def allocate(self, nbytes: int) -> int:
        """Address of `nbytes` of device memory. Raises UhdError where there is not enough."""
        self.use()
        status, address = self._api.cudaMalloc(max(nbytes, 1))
        if status == self._api.cudaError_t.cudaErrorMemoryAllocation:
            free, total = self._call("cudaMemGetInfo")
            raise UhdError(
                f"GPU memory: {nbytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} of {total / 1e9:.2f} GB are "
                "free; use a smaller context, fewer slices or int4 weights, or close other programs"
            )
        self._check("cudaMalloc", status)
        return int(address)

    def allocate_host(self, nbytes: int) -> int:
        """Address of `nbytes` of this machine's memory that the GPU copies from and to by itself."""
        return int(self._call("cudaHostAlloc", max(nbytes, 1), self._api.cudaHostAllocDefault))

    def free_host(self, address: int) -> None:
        """Give memory of `allocate_host` back, after the work that uses it."""
        self._call("cudaFreeHost", address)

    def free(self, address: int) -> None:
        """Give memory back, after the work that uses it."""
        self._call("cudaFree", address)

    def zero(self, address: int, nbytes: int) -> None:
        """Queue filling memory with zeros."""
        self._call("cudaMemsetAsync", address, 0, nbytes, self.stream)

    def copy_in(self, address: int, array: NDArray[Any]) -> None:
        """Queue the copy of a contiguous array to the device.

        The array may be changed on return, unless it lies in memory of `allocate_host`.
        """
        kind = self._api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self.stream)

    def copy_out(self, array: NDArray[Any], address: int) -> None:
        """Queue the copy of device memory to a contiguous array; read it after `synchronize`."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self.stream)

    def copy(self, to: int, source: int, nbytes: int) -> None:
        """Queue a copy on the device."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpyAsync", to, source, nbytes, kind, self.stream)

    def synchronize(self) -> None:
        """Wait for everything queued. Raises UhdError where the work failed."""
        self._call("cudaStreamSynchronize", self.stream)
        self.waits += 1

    def capture(self, queue: Callable[[], object]) -> int:
        """A graph of what `queue` puts on the stream, without running it."""
        mode = self._api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self.stream, mode)
        try:
            queue()
        finally:
            graph = self._call("cudaStreamEndCapture", self.stream)
        try:
            return int(self._call("cudaGraphInstantiate", graph, 0))
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: int) -> None:
        """Queue a captured graph."""
        self._call("cudaGraphLaunch", graph, self.stream)

    def free_graph(self, graph: int) -> None:
        """Drop a captured graph."""
        self._call("cudaGraphExecDestroy", graph)

    def _first_call(self) -> int:
        """Number of GPUs, in words where there is no usable driver."""
        status, count = self._api.cudaGetDeviceCount()
        error = self._api.cudaError_t
        if status in (error.cudaErrorInsufficientDriver, error.cudaErrorNoDevice):
            raise UhdError(
                f"GPU: no usable NVIDIA driver or device ({status.name}); install or update the driver, "
                "or use a bundle for onnxruntime"
            )
        self._check("cudaGetDeviceCount", status)
        return int(count)

    def use(self) -> None:
        """Make this the calling thread's GPU: each thread begins with the first one."""
        if not getattr(self._thread, "chosen", False):
            self._thread.chosen = True
            self._call("cudaSetDevice", self.number)

    def _call(self, name: str, *arguments: Any) -> Any:
        self.use()
        status, *results = getattr(self._api, name)(*arguments)
        self._check(name, status)
        return results[0] if len(results) == 1 else tuple(results)

    def _check(self, name: str, status: Any) -> None:
        if status != self._api.cudaError_t.cudaSuccess:
            raise UhdError(f"GPU: {name} failed ({status.name}); a defect of the engine, or a GPU in trouble")


@functools.cache
def _opened() -> list[Cuda]:
    return []


def open_cuda(number: int = 0) -> Cuda:
    """The GPU, opened once a process: all engines share its stream. UhdError where another one is open."""
    opened = _opened()
    if not opened:
        opened.append(Cuda(number))
    if opened[0].number != number:
        raise UhdError(
            f"device cuda:{number}: this process runs TensorRT on GPU {opened[0].number}; one is the limit"
        )
    return opened[0]


def current_capability() -> str:
    """Compute capability of the GPU at hand, such as "8.9". Raises UhdError where there is none."""
    return open_cuda().capability


def _import_runtime() -> ModuleType:
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise UhdError(f"GPU: cuda-python is not installed ({error}); {INSTALL}") from None
    module: ModuleType = runtime
    return module
