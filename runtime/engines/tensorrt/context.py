"""One execution context of an engine: chooses the profile, places buffers, queues runs."""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from uhd_export.runtime.engines.tensorrt.backend import messages
from uhd_export.runtime.engines.tensorrt.cuda import Cuda
from uhd_export.runtime.engines.tensorrt.memory import Array, Buffer, DeviceArray
from uhd_export.runtime.engines.tensorrt.record import EngineRecord, OptimizationProfile, Shape
from uhd_export.runtime.errors import UhdError

# A run is captured as a CUDA graph when its shapes and addresses come back: the first run compiles and
# allocates, which cannot be captured.
_CAPTURE_AT = 2
_SCRATCH = ""
log = logging.getLogger(__name__)


class Context:
    """Runs one engine on the shared stream, with buffers of its own for what is not bound.

    `scratch` is the engines' memory for activations, shared because all runs are queued on one stream.
    `bound` are inputs and outputs at fixed places. With `graphs`, repeated runs become CUDA graphs: by
    TensorRT-RTX itself, by stream capture in TensorRT.
    """

    def __init__(
        self,
        trt: ModuleType,
        cuda: Cuda,
        engine: Any,
        record: EngineRecord,
        scratch: Buffer,
        *,
        bound: Mapping[str, DeviceArray] | None = None,
        graphs: bool = False,
        jit_cache: Any = None,
    ) -> None:
        self._cuda, self._record, self._scratch = cuda, record, scratch
        self._bound = dict(bound or {})
        native = hasattr(trt, "CudaGraphStrategy")
        with messages(trt) as said:
            self.context = _create(trt, engine, graphs=graphs and native, jit_cache=jit_cache)
        if self.context is None:
            raise UhdError(f"engine: TensorRT cannot prepare to run it ({said.reason})")
        self._trt, self._graphs = trt, graphs and not native
        self._buffers: dict[str, Buffer] = {}
        self._profile: int | None = None
        self._shapes: dict[str, Shape] = {}
        self._outputs: dict[str, DeviceArray] = {}
        self._addresses: dict[str, int] = {}
        self._needs = 0  # bytes of scratch for these shapes
        self._captured: dict[tuple[Any, ...], int] = {}
        self._seen: tuple[tuple[Any, ...], int] = ((), 0)

    @property
    def nbytes(self) -> int:
        """Memory of the buffers that belong to this context."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def run(self, feeds: Mapping[str, Array], *, own: bool = False) -> dict[str, DeviceArray]:
        """Queue one run; the outputs that are not bound, valid until the next run of this context.

        With `own`, those that are not updated in place lie in memory of their own, and stay valid.
        Raises UhdError where no profile holds the shapes, or the run cannot be queued.
        """
        places = {**self._bound, **{name: self._place(name, feed) for name, feed in feeds.items()}}
        shapes = {name: array.shape for name, array in places.items() if name in self._record.inputs}
        if shapes != self._shapes:
            self._shapes = {}  # until all is set: after an error nothing is taken for done
            self._set_shapes(shapes)
            self._place_outputs(places)
            self._shapes = shapes
        outputs = dict(self._outputs)
        if own:
            for name in outputs.keys() - self._record.aliases.keys():
                array = outputs[name]
                outputs[name] = DeviceArray.allocate(self._cuda, array.shape, array.dtype)
        for name, array in {**places, **outputs}.items():
            if self._addresses.get(name) != array.address:
                self._done(self.context.set_tensor_address(name, array.address), f"place of {name}")
                self._addresses[name] = array.address
        # Others share it, and where there was no room for what one of them asked it is gone.
        self._scratch.ensure(self._needs)
        if self._addresses.get(_SCRATCH) != self._scratch.address:
            self.context.set_device_memory(self._scratch.address, self._scratch.nbytes)
            self._addresses[_SCRATCH] = self._scratch.address
        self._queue()
        return outputs

    def close(self) -> None:
        """Free the context, its graphs and buffers."""
        self._cuda.synchronize()
        self._drop_graphs()
        self._outputs.clear()
        self.context = None
        for buffer in self._buffers.values():
            buffer.close()
        self._buffers.clear()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at exit, when CUDA may be gone before us
            self._drop_graphs()

    def _place(self, name: str, feed: Array) -> DeviceArray:
        """`feed` on the device: as it is, or copied to this context's buffer for it.

        What the engine updates in place is copied too: the caller's array stays as it is.
        """
        if isinstance(feed, DeviceArray) and name not in self._record.aliases.values():
            return feed
        buffer = self._buffers.setdefault(name, Buffer(self._cuda))
        buffer.ensure(feed.nbytes)
        if isinstance(feed, DeviceArray):
            self._cuda.copy(buffer.address, feed.address, feed.nbytes)
        else:
            self._cuda.copy_in(buffer.address, np.asarray(feed, order="C"))
        return DeviceArray(buffer, buffer.address, tuple(feed.shape), feed.dtype)

    def _set_shapes(self, shapes: dict[str, Shape]) -> None:
        """Choose the profile, tell the shapes, and ask what activations take."""
        self._drop_graphs()  # a captured graph holds what the context was then
        self._addresses.clear()  # what a change of profile keeps is not documented
        index = self._choose_profile(shapes)
        if index != self._profile:
            self._done(self.context.set_optimization_profile_async(index, self._cuda.stream), "profile")
            self._profile = index
        for name, shape in shapes.items():
            self._done(self.context.set_input_shape(name, shape), f"shape of {name}")
        self._needs = self.context.update_device_memory_size_for_shapes()

    def _place_outputs(self, places: Mapping[str, DeviceArray]) -> None:
        """Buffers for the outputs that are not bound; those written in place lie where their input is."""
        self._outputs.clear()
        for name, tensor in self._record.outputs.items():
            if name in self._bound:
                continue
            shape, dtype = tuple(self.context.get_tensor_shape(name)), tensor.info.dtype
            if name in self._record.aliases:
                self._outputs[name] = places[self._record.aliases[name]]
                continue
            buffer = self._buffers.setdefault(name, Buffer(self._cuda))
            buffer.ensure(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
            self._outputs[name] = DeviceArray(buffer, buffer.address, shape, dtype)

    def _choose_profile(self, shapes: Mapping[str, Shape]) -> int:
        """The first profile that holds all shapes."""
        profiles = self._record.profiles
        for index, profile in enumerate(profiles):
            if profile.covers(shapes):
                return index
        raise UhdError(_misfit(shapes, profiles))

    def _queue(self) -> None:
        if not self._graphs:
            self._enqueue()
            return
        key = (tuple(self._shapes.items()), tuple(self._addresses.items()))
        if key not in self._captured:
            count = self._seen[1] + 1 if self._seen[0] == key else 1
            self._seen = (key, count)
            if count < _CAPTURE_AT:
                self._enqueue()
                return
            self._drop_graphs()  # memory moved; one graph a context, since decoding repeats one run
            try:
                self._captured[key] = self._cuda.capture(self._enqueue)
            except UhdError as error:
                self._graphs = False
                log.warning("CUDA graph: not captured (%s); decoding launches its kernels one by one", error)
                self._enqueue()
                return
        self._cuda.launch(self._captured[key])

    def _drop_graphs(self) -> None:
        for graph in self._captured.values():
            self._cuda.free_graph(graph)
        self._captured.clear()
        self._seen = ((), 0)

    def _enqueue(self) -> None:
        with messages(self._trt) as said:
            queued = self.context.execute_async_v3(self._cuda.stream)
        self._done(queued, f"run ({said.reason})")

    def _done(self, done: bool, what: str) -> None:
        if not done:
            raise UhdError(f"engine: TensorRT refuses the {what}; build the bundle again")


def _misfit(shapes: Mapping[str, Shape], profiles: Sequence[OptimizationProfile]) -> str:
    """Which input fits no profile, and what would; else an input that decides between profiles."""

    def fits(name: str, profile: OptimizationProfile) -> bool:
        return name not in profile.ranges or profile.ranges[name].covers(shapes[name])

    name = next((n for n in shapes if not any(fits(n, p) for p in profiles)), None)
    name = name or next(n for n in shapes if not all(fits(n, p) for p in profiles))
    ranges = [p.ranges[name] for p in profiles if name in p.ranges]
    built = "; ".join(f"{list(r.min)} to {list(r.max)}" for r in ranges)
    return (
        f"input {name} of shape {list(shapes[name])}: the engine was built for {built}; build the bundle "
        "again with a larger range, or use one for onnxruntime"
    )


def _create(trt: ModuleType, engine: Any, *, graphs: bool, jit_cache: Any) -> Any:
    """An execution context that leaves the memory for activations to us."""
    strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    if not hasattr(trt, "CudaGraphStrategy"):
        return engine.create_execution_context(strategy)
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(strategy)
    if graphs:
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    if jit_cache is not None:
        config.set_runtime_cache(jit_cache)
    return engine.create_execution_context(config)
