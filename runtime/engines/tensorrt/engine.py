"""TensorRT and TensorRT-RTX as engines: loading with every mismatch explained, runs on device memory."""

import functools
import mmap
import weakref
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uhd_export.runtime.engines.base import Binding, Engine, Stop, check_feeds
from uhd_export.runtime.engines.device import describe, parse_device
from uhd_export.runtime.engines.tensorrt.backend import (
    BACKENDS,
    logger,
    messages,
    open_tensorrt,
    supported_capabilities,
)
from uhd_export.runtime.engines.tensorrt.context import Context
from uhd_export.runtime.engines.tensorrt.cuda import Cuda, open_cuda
from uhd_export.runtime.engines.tensorrt.jit import JitCache
from uhd_export.runtime.engines.tensorrt.memory import Array, Buffer, DeviceArray, gather
from uhd_export.runtime.engines.tensorrt.plugins import find_plugins, plugin_errors
from uhd_export.runtime.engines.tensorrt.profiler import LayerTimes
from uhd_export.runtime.engines.tensorrt.record import read_record
from uhd_export.runtime.engines.tensorrt.staging import staging
from uhd_export.runtime.errors import UhdError


class TensorrtEngine(Engine):
    """An engine file built by `uhd_export.tensorrt`; see `Engine`.

    Weights, activations and bound buffers stay on the GPU. All engines of a process share one stream and one
    memory for activations. `profile` is where a trace of layer times goes, which `end_profile` writes.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: str = "cuda",
        threads: int | None = None,
        profile: str | Path | None = None,
    ) -> None:
        where = parse_device(device)
        if where.kind != "cuda":
            raise UhdError(f"device {device}: a TensorRT engine runs on cuda; use a bundle for onnxruntime")
        self.path, self.record = Path(path), read_record(path)
        self.trt = open_tensorrt(self.record.backend)
        self._check_version()
        self.cuda = open_cuda(where.number)
        self._check_gpu()
        self.where = f"{where} ({self.record.backend} {self.trt.__version__}, {describe(where)})"
        self._plugins = find_plugins(self.path) if self.record.plugin_layers else []
        for plugins in self._plugins:
            plugins.register(self.trt)
        self.inputs = {name: tensor.info for name, tensor in self.record.inputs.items()}
        self.outputs = {name: tensor.info for name, tensor in self.record.outputs.items()}
        self._runtime = self.trt.Runtime(logger(self.trt))
        self._engine = self._load()
        self.weight_bytes = self._weights()
        self._jit = JitCache(self.trt, self._engine, self.record, self.cuda)
        self._trace = Path(profile) if profile is not None else None
        self.times = LayerTimes()
        # Whoever decodes with one holds it: a cache that is gone leaves none of its memory here.
        self._contexts: weakref.WeakSet[Context] = weakref.WeakSet()
        self._single: Context | None = None

    @property
    def device_bytes(self) -> int:
        """Memory for activations, shared with the process's other engines, and for inputs and outputs."""
        return _shared_scratch(self.cuda).nbytes + sum(context.nbytes for context in self._contexts)

    @property
    def most_scratch_bytes(self) -> int:
        """The engine's own figure for activations at the largest shapes of any profile."""
        return int(self._engine.device_memory_size_v2)

    def infer(self, feeds: Mapping[str, Array], stop: Stop | None = None) -> dict[str, NDArray[Any]]:
        """See `Engine.infer`. Feeds may be device arrays too."""
        check_feeds(feeds, self.inputs, {})
        with self.cuda.lock, plugin_errors(self._plugins):
            return self._fetch(self._alone().run(feeds))

    def infer_resident(self, feeds: Mapping[str, Array], stop: Stop | None = None) -> dict[str, DeviceArray]:
        """As `infer`, but the outputs are arrays of their own on the device."""
        check_feeds(feeds, self.inputs, {})
        inplace = self.record.aliases
        with self.cuda.lock, plugin_errors(self._plugins):
            outputs = self._alone().run(feeds, own=True)
            return {name: self._copy(array) if name in inplace else array for name, array in outputs.items()}

    def gather(self, pieces: Sequence[Array], dtype: np.dtype[Any]) -> DeviceArray:
        """(S, D) rows of all pieces on the device; see `memory.gather`."""
        with self.cuda.lock:
            return gather(self.cuda, pieces, dtype)

    def staging(self, shape: Sequence[int], dtype: np.dtype[Any]) -> NDArray[Any]:
        """See `Engine.staging`."""
        return staging(self.cuda, shape, dtype)

    def keep(self, array: NDArray[Any]) -> DeviceArray:
        """See `Engine.keep`."""
        with self.cuda.lock:
            kept = DeviceArray.allocate(self.cuda, array.shape, array.dtype)
            self.cuda.copy_in(kept.address, np.ascontiguousarray(array))
        return kept

    def fetch(self, array: Array) -> NDArray[Any]:
        """A copy of `array` on the host."""
        with self.cuda.lock:
            return array.numpy(self.cuda) if isinstance(array, DeviceArray) else array

    def bind(self, shared: Mapping[str, str], sizes: Mapping[str, int]) -> "TensorrtBinding":
        """See `Engine.bind`. Only outputs that the engine updates in place can share a buffer."""
        with self.cuda.lock:
            return TensorrtBinding(self, shared, sizes)

    def context(self, bound: Mapping[str, DeviceArray], *, graphs: bool) -> Context:
        """A context of this engine; graphs are left out where times by layer are wanted."""
        context = Context(
            self.trt,
            self.cuda,
            self._engine,
            self.record,
            _shared_scratch(self.cuda),
            bound=bound,
            graphs=graphs and self._trace is None,
            jit_cache=self._jit.handle,
        )
        if self._trace is not None:
            self.times.attach(self.trt, context.context)
        self._contexts.add(context)
        return context

    def end_profile(self) -> Path:
        """Write the trace of layer times so far (Chrome trace events, microseconds) and return its path."""
        if self._trace is None:
            raise UhdError("engine: it was opened without a path for the trace")
        self.cuda.synchronize()
        return self.times.write(self._trace.with_name(f"{self._trace.name}.json"))

    def close(self) -> None:
        """Free the engine's memory, and keep the kernels compiled on this GPU for the next time."""
        for context in self._contexts:
            context.close()
        self._contexts.clear()
        if self._engine is not None:
            self._jit.save()
        self._jit.handle = self._engine = self._runtime = self._single = None

    def _fetch(self, arrays: Mapping[str, DeviceArray]) -> dict[str, NDArray[Any]]:
        out = {name: np.empty(array.shape, array.dtype) for name, array in arrays.items()}
        for name, array in arrays.items():
            self.cuda.copy_out(out[name], array.address)
        self.cuda.synchronize()
        return out

    def _copy(self, array: DeviceArray) -> DeviceArray:
        own = DeviceArray.allocate(self.cuda, array.shape, array.dtype)
        self.cuda.copy(own.address, array.address, array.nbytes)
        return own

    def _alone(self) -> Context:
        if self._single is None:
            self._single = self.context({}, graphs=False)
        return self._single

    def _check_version(self) -> None:
        built, installed = self.record.tensorrt, self.trt.__version__
        if built != installed:
            package = BACKENDS[self.record.backend].name
            raise UhdError(
                f"engine {self.path}: built by {package} {built}, but {installed} is installed; build the "
                f"bundle again, or pip install {package}=={built}"
            )

    def _check_gpu(self) -> None:
        targets, present = self.record.compute_capabilities, self.cuda.capability
        if present in targets:
            return
        remedy = "on this machine, with --backend tensorrt"
        if present in supported_capabilities(self.trt):
            remedy = f"with --compute-capability {present}"
        raise UhdError(
            f"engine {self.path}: built for compute capability {', '.join(targets)}, but this GPU has "
            f"{present} ({self.cuda.name}); build the bundle again {remedy}"
        )

    def _load(self) -> Any:
        """The deserialized engine, read from the mapped file."""
        with (
            self.path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
            memoryview(content) as view,
            messages(self.trt) as said,
            plugin_errors(self._plugins),
        ):
            reason = _diagnose(self.trt, self._runtime, view)
            engine = None if reason else self._runtime.deserialize_cuda_engine(view)
        if engine is None:
            reason = reason or said.reason
            raise UhdError(f"engine {self.path}: TensorRT cannot load it ({reason}); build the bundle again")
        return engine

    def _weights(self) -> int:
        """The engine's own figure, or what was recorded where this TensorRT gives none."""
        if not hasattr(self.trt, "EngineStat"):
            return self.record.weight_bytes
        return int(self._engine.get_engine_stat(self.trt.EngineStat.TOTAL_WEIGHTS_SIZE))


class TensorrtBinding(Binding):
    """Buffers of a `TensorrtEngine` that outputs are written into in place."""

    def __init__(self, engine: TensorrtEngine, shared: Mapping[str, str], sizes: Mapping[str, int]) -> None:
        self._engine, self._shared = engine, dict(shared)
        self._arrays: dict[str, DeviceArray] = {}
        for past, present in shared.items():
            if engine.record.aliases.get(present) != past:
                raise UhdError(f"engine {engine.path}: output {present} is not written in place of {past}")
            info = engine.inputs[past]
            array = DeviceArray.allocate(engine.cuda, info.resolve(sizes), info.dtype)
            engine.cuda.zero(array.address, array.nbytes)
            self._arrays[past] = array
        self.nbytes = sum(array.nbytes for array in self._arrays.values())
        bound = {name: self._arrays[past] for past, present in shared.items() for name in (past, present)}
        self._bound = bound
        self._contexts: dict[int, Context] = {}

    def infer(
        self,
        feeds: Mapping[str, Array],
        stop: Stop | None = None,
        *,
        outputs: Collection[str] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """See `Binding.infer`. Feeds may be device arrays too, which are read where they are."""
        check_feeds(feeds, self._engine.inputs, self._shared)
        with self._engine.cuda.lock:
            arrays = self._context(feeds).run(feeds)
            wanted = arrays.keys() if outputs is None else outputs
            return self._engine._fetch({name: arrays[name] for name in wanted})

    def _context(self, feeds: Mapping[str, Array]) -> Context:
        """The context for these shapes: one for each profile, so that a prompt leaves decoding's graph alone.

        A graph pays where one run repeats, as in a profile of one shape.
        """
        shapes = {name: tuple(array.shape) for name, array in feeds.items()}
        profiles = self._engine.record.profiles
        index = next((i for i, profile in enumerate(profiles) if profile.covers(shapes)), 0)
        if index not in self._contexts:
            fixed = all(found.min == found.max for found in profiles[index].ranges.values())
            self._contexts[index] = self._engine.context(self._bound, graphs=fixed)
        return self._contexts[index]

    def read(self, name: str) -> NDArray[Any]:
        """See `Binding.read`."""
        return self._arrays[name].numpy(self._engine.cuda)


@functools.cache
def _shared_scratch(cuda: Cuda) -> Buffer:
    """The process's memory for activations: runs follow each other on one stream, so one is enough."""
    return Buffer(cuda)


def _diagnose(trt: ModuleType, runtime: Any, content: memoryview) -> str:
    """Why TensorRT-RTX holds the engine for unusable here, or nothing."""
    if not hasattr(runtime, "get_engine_validity"):
        return ""
    validity, flags = runtime.get_engine_validity(content)
    if validity != trt.EngineValidity.INVALID:
        return ""
    reasons = trt.EngineInvalidityDiagnostics.__members__.items()
    named = [name.lower().replace("_", " ") for name, value in reasons if flags & int(value)]
    return ", ".join(named) or "not valid on this system"
