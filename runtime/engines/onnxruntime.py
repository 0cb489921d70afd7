"""ONNX Runtime as an engine, on the CPU or a CUDA device."""

import time
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from uhd_export.runtime.choices import updates_on_gpu
from uhd_export.runtime.engines.arena import share_arena, shrink_arena
from uhd_export.runtime.engines.attention import attention_at_once
from uhd_export.runtime.engines.base import (
    Array,
    Binding,
    Engine,
    Stop,
    Stopped,
    TensorInfo,
    check_feeds,
)
from uhd_export.runtime.engines.buffers import Buffer
from uhd_export.runtime.engines.denormals import SUPPORTED as SETS_DENORMALS
from uhd_export.runtime.engines.denormals import denormals_as_zero
from uhd_export.runtime.engines.device import Device, describe, parse_device
from uhd_export.runtime.engines.fetch import Fetch
from uhd_export.runtime.engines.interruptible import Caller
from uhd_export.runtime.engines.large_pages import large_pages
from uhd_export.runtime.engines.wheels import CUDA_PROVIDER, INSTALL_GPU, cuda_refusal, prepare_cuda
from uhd_export.runtime.errors import UhdError, explain, is_out_of_memory
from uhd_export.runtime.memory import return_memory

T = TypeVar("T")
_CPU_PROVIDER = "CPUExecutionProvider"
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


# A run like one that took less is not worth a thread of its own to be interrupted in: handing it over takes
# 0.1 ms, a third of a small model's step.
_SHORT = 0.05


class OrtEngine(Engine):
    """A graph in an ONNX Runtime session; see `Engine`.

    On the CPU all engines take their memory from one arena, which `trim` shrinks (see `arena`). `profile` is
    a path prefix: `end_profile` returns the trace's path. `tf32` lets float32 products on a GPU round to
    TF32. `graph` runs in the place of the one at `path`, with the weights beside that.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: str = "cpu",
        threads: int | None = None,
        tf32: bool = False,
        profile: str | Path | None = None,
        graph: bytes | None = None,
    ) -> None:
        self._caller = Caller()
        self._alone: OrtBinding | None = None  # for runs with nothing bound, on a device
        self._seconds: dict[int, float] = {}  # of the last run, by the bytes it was fed
        self._bindings: weakref.WeakSet[OrtBinding] = weakref.WeakSet()
        self.device = parse_device(device)
        self.on_host = self.device.kind == "cpu"
        missing = prepare_cuda(ort) if self.device.kind == "cuda" else ""
        if not Path(path).is_file():
            raise UhdError(f"engine {path}: no such file")
        self.path = Path(path)
        # On the CPU the tests hold that; for a GPU the first run of a binding shows it.
        self.updates_in_place = self.device.kind == "cpu"
        options = ort.SessionOptions()
        if self.on_host:
            share_arena(options)
        # Else the second run with some shapes takes one block for all that the first held at a time, which is
        # larger than what the arena has, and is kept for every shape: half as much memory again, no faster.
        options.enable_mem_pattern = False
        options.log_severity_level = 4  # what fails is raised, and told once
        # Graphs for other backends hold DequantizeLinear: no rounding of activations where it is fused.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        if graph is not None:
            folder = str(self.path.parent.resolve())
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        if SETS_DENORMALS:  # in the threads of the session; elsewhere the caller's could not be set back
            options.add_session_config_entry("session.set_denormal_as_zero", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        files = [self.path, self.path.with_name(f"{self.path.name}.data")]
        self.weight_bytes = sum(file.stat().st_size for file in files if file.is_file())
        providers = _providers(self.device, tf32)
        ort.set_default_logger_severity(4)
        try:
            with (
                attention_at_once((graph or self.path.read_bytes()) if self.on_host else b""),
                denormals_as_zero(),
                large_pages(_loaded(self.weight_bytes) if self.on_host else 0),
            ):
                self.session = ort.InferenceSession(
                    graph or str(path), options, providers=providers, enable_fallback=False
                )
        except Exception as error:  # the binding's exceptions have no common base but this
            if is_out_of_memory(error):
                raise UhdError(f"engine {path}: {explain(error)}") from None
            if (refusal := cuda_refusal(str(error))) is not None:
                raise UhdError(f"device {device}: {refusal}") from None
            raise UhdError(
                f"engine {path}: ONNX Runtime cannot load it ({_reason(error)}); build it again"
            ) from None
        finally:
            ort.set_default_logger_severity(2)  # as it is by default
        if self.device.kind == "cuda" and CUDA_PROVIDER not in self.session.get_providers():
            raise UhdError(
                f"device {device}: ONNX Runtime cannot use it{f' ({missing})' if missing else ''}; check the "
                f"driver, and {INSTALL_GPU}"
            )
        self.where = f"{self.device} (ONNX Runtime {ort.__version__}, {describe(self.device)})"
        self.inputs = {i.name: _describe(i) for i in self.session.get_inputs()}
        self.outputs = {o.name: _describe(o) for o in self.session.get_outputs()}
        self.trim()

    def infer(self, feeds: Mapping[str, Array], stop: Stop | None = None) -> dict[str, NDArray[Any]]:
        """See `Engine.infer`. Feeds may be what `keep` returned."""
        if self.device.kind != "cpu":
            self._alone = self._alone or OrtBinding(self, {}, {})
            return self._alone.infer(feeds, stop)
        check_feeds(feeds, self.inputs, {})
        with self.errors():
            results = self.run(lambda options: self.session.run(None, dict(feeds), options), feeds, stop)
        # They lie in the arena, where the least of them keeps a whole block from being returned.
        return {name: np.array(result) for name, result in zip(self.outputs, results, strict=True)}

    def keep(self, array: NDArray[Any]) -> Array:
        """See `Engine.keep`."""
        return array if self.device.kind == "cpu" else Buffer.of(array, self.device)

    def bind(self, shared: Mapping[str, str], sizes: Mapping[str, int]) -> "OrtBinding":
        """See `Engine.bind`."""
        binding = OrtBinding(self, shared, sizes)
        self._bindings.add(binding)
        return binding

    def run(self, run: Callable[[ort.RunOptions], T], feeds: Mapping[str, Array], stop: Stop | None) -> T:
        """`run` with options through which `stop`, or Ctrl-C, ends it. Raises Stopped where `stop` did."""
        options = ort.RunOptions()
        size = sum(array.nbytes for array in feeds.values())
        start = time.monotonic()
        if self._seconds.get(size, _SHORT) < _SHORT:
            result = _stoppable(run, options, stop or Stop())
        else:
            result = self._caller.call(lambda stop: _stoppable(run, options, stop), stop)
        self._seconds[size] = time.monotonic() - start
        return result

    @contextmanager
    def errors(self) -> Iterator[None]:
        """What ONNX Runtime raises in a run becomes a UhdError, memory that ran out aside (see `explain`)."""
        try:
            yield
        except Exception as error:
            ours = isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime")
            if not ours or explain(error) is not None:
                raise
            raise UhdError(
                f"engine {self.path}: ONNX Runtime cannot run it on {self.device} ({_reason(error)}); "
                "build the bundle again, or use another --device"
            ) from error

    def end_profile(self) -> Path:
        """Stop profiling; the path of the JSON trace (Chrome trace events, microseconds)."""
        return Path(self.session.end_profiling())

    def trim(self) -> None:
        """See `Engine.trim`."""
        if self.on_host:
            shrink_arena()
            return_memory()

    def close(self) -> None:
        """Free the session and the buffers of its bindings, each of which holds it. May be repeated."""
        self._caller.close()
        for binding in self._bindings:
            binding.close()
        self._bindings.clear()
        self._alone = None
        if hasattr(self, "session"):
            del self.session
            self.trim()


class OrtBinding(Binding):
    """Buffers of an `OrtEngine` bound once through IOBinding."""

    def __init__(
        self,
        engine: OrtEngine,
        shared: Mapping[str, str],
        sizes: Mapping[str, int],
        buffers: Mapping[str, Buffer] | None = None,
    ) -> None:
        self._engine, self._shared, self._sizes = engine, dict(shared), dict(sizes)
        self._buffers = dict(buffers or {})
        self.nbytes = 0
        _check_placement(engine, shared)
        for past in shared:
            info = engine.inputs[past]
            if past not in self._buffers:
                self._buffers[past] = Buffer.zeros(info.resolve(sizes), info.dtype, engine.device)
            self.nbytes += self._buffers[past].nbytes
        self._fetches: dict[frozenset[str], Fetch] = {}

    def infer(
        self,
        feeds: Mapping[str, Array],
        stop: Stop | None = None,
        *,
        outputs: Collection[str] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """See `Binding.infer`."""
        engine = self._engine
        check_feeds(feeds, engine.inputs, self._shared)
        wanted = frozenset(engine.outputs.keys() - set(self._shared.values()) if outputs is None else outputs)
        if wanted not in self._fetches:
            tensors = {name: engine.outputs[name] for name in wanted}
            self._fetches[wanted] = Fetch(engine.session, self._shared, self._buffers, tensors, self._sizes)
        fetch = self._fetches[wanted]
        with engine.errors():
            fetch.feed(feeds)
            engine.run(fetch.run, feeds, stop)
        if not engine.updates_in_place and self._shared:
            self._check_update()
        return fetch.results()

    def rows(self, start: int, stop: int) -> "OrtBinding":
        """See `Binding.rows`."""
        axes = {self._engine.inputs[past].shape[0] for past in self._shared}
        axis = next(iter(axes))
        if len(axes) != 1 or not isinstance(axis, str):
            raise UhdError(f"engine {self._engine.path}: its cache has no rows; build the bundle again")
        parts = {name: buffer.rows(start, stop) for name, buffer in self._buffers.items()}
        binding = OrtBinding(self._engine, self._shared, self._sizes | {axis: stop - start}, parts)
        self._engine._bindings.add(binding)
        return binding

    def close(self) -> None:
        """Let go of the session and the buffers; it cannot be used afterwards. May be repeated."""
        self._fetches.clear()
        self._buffers.clear()

    def read(self, name: str) -> NDArray[Any]:
        """See `Binding.read`."""
        return self._buffers[name].read()

    def _check_update(self) -> None:
        """After the engine's first run: a buffer that is zero still was not updated. Raises UhdError."""
        name = next(reversed(self._buffers))
        if not self._buffers[name].read().any():
            raise UhdError(
                f"engine {self._engine.path}: {name} is not updated in place on {self._engine.device}; "
                "this ONNX Runtime cannot run it: use another version, or --device cpu"
            )
        self._engine.updates_in_place = True


def _providers(device: Device, tf32: bool) -> list[str | tuple[str, dict[str, str]]]:
    """The providers of a session; the CPU runs what the device's does not, such as shape arithmetic."""
    if device.kind == "cpu":
        return [_CPU_PROVIDER]
    options = {
        "device_id": str(device.number),
        # By default products of float32 are rounded to TF32: an error of 1e-3, which nobody asked for.
        "use_tf32": str(int(tf32)),
        # By default the arena doubles each time it grows, and takes up to twice what is needed.
        "arena_extend_strategy": "kSameAsRequested",
        "enable_cudnn": "0",
    }
    return [(CUDA_PROVIDER, options), _CPU_PROVIDER]


def _check_placement(engine: OrtEngine, shared: Mapping[str, str]) -> None:
    """Refuse to share buffers that the session reads or writes elsewhere than on the engine's device.

    ONNX Runtime would copy such an input once, when it is bound, and update the copy: every run but the first
    would start from what it held then, without an error.
    """
    session, device = engine.session, engine.device
    if device.kind == "cpu":
        return
    places = dict(zip((i.name for i in session.get_inputs()), session.get_input_memory_infos(), strict=True))
    places |= zip((o.name for o in session.get_outputs()), session.get_output_memory_infos(), strict=True)
    floats = any(info.dtype == np.float32 for info in engine.inputs.values())
    activations = "float32" if floats else "float16"
    for name in (name for pair in shared.items() for name in pair):
        place, info = places[name], (engine.inputs | engine.outputs)[name]
        there = place.name.lower() == device.kind and place.device_id == device.number
        if there and updates_on_gpu(info.dtype.name, activations):
            continue
        remedy = "use --device cpu"
        if info.dtype in (np.float32, np.int8):
            remedy = "build the bundle with --dtype float16, or use --device cpu"
        raise UhdError(
            f"device {device}: ONNX Runtime has no kernel that updates {name} in {info.dtype} there; {remedy}"
        )


def _loaded(weight_bytes: int) -> int:
    """Bytes that a session allocates for so many of weights: a tenth more in 4 bits, and its graph."""
    return weight_bytes * 11 // 10 + (32 << 20)


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _stoppable(run: Callable[[ort.RunOptions], T], options: ort.RunOptions, stop: Stop) -> T:
    with stop.ending(lambda: setattr(options, "terminate", True)), denormals_as_zero():
        try:
            return run(options)
        except Exception:  # the binding's exceptions have no common base but this
            if stop.requested:
                raise Stopped from None
            raise


def _describe(value: ort.NodeArg) -> TensorInfo:
    shape = tuple(d if isinstance(d, int) else str(d) for d in value.shape)
    return TensorInfo(np.dtype(_TYPES[value.type]), shape)
