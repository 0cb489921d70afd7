"""Engines on a GPU: the vision graph and an int4 decode loop, in TensorRT and ONNX Runtime's CUDA provider.

Whatever cannot run on this machine raises `Unavailable` with the reason.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from attempts import Unavailable

from uhd_export.checkpoint.config import CheckpointConfig
from uhd_export.checkpoint.int4.weight import QuantizedWeight, round_to_nearest
from uhd_export.graph.int4.formats import ByName, Description, Int4Dequantize, MatMulNBits
from uhd_export.graph.language import emit_language
from uhd_export.graph.linear import Dense, Linear
from uhd_export.runtime.config import LanguageConfig
from uhd_export.runtime.engines.backends import open_engine
from uhd_export.runtime.engines.base import Engine
from uhd_export.runtime.engines.tensorrt.backend import (
    BACKENDS,
    describe_backend,
    open_tensorrt,
    supported_capabilities,
)
from uhd_export.runtime.engines.tensorrt.engine import TensorrtEngine
from uhd_export.runtime.engines.tensorrt.memory import DeviceArray
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.geometry import crop_geometry
from uhd_export.runtime.language.decoder import Decoder
from uhd_export.tensorrt import EngineOptions, build_engine, language_profiles, vision_profiles

GROUP = 128
# Memory is taken and kernels are compiled in the first runs; TensorRT-RTX goes on compiling for the shapes at
# hand in the background.
WARM_SECONDS = 5.0
Shape = tuple[int, int, int]


def choose_backend(capability: str) -> str:
    """The TensorRT that is installed and runs on this GPU."""
    reasons = []
    for name in BACKENDS:
        try:
            trt = open_tensorrt(name)
        except UhdError as error:
            reasons.append(str(error))
            continue
        if not describe_backend(name).targets or capability in supported_capabilities(trt):
            return name
        reasons.append(f"{name} {trt.__version__} has no target for compute capability {capability}")
    raise Unavailable("; ".join(reasons))


def vision_engine(graph: Path, config: CheckpointConfig, capability: str, *, plugins: bool) -> TensorrtEngine:
    """The engine of the vision graph at `graph` for this GPU."""
    backend = choose_backend(capability)
    options = EngineOptions(backend, (capability,), plugins=plugins)
    path = graph.with_name(f"vision-{'plugins' if plugins else 'plain'}.engine")
    try:
        build_engine(graph, path, vision_profiles(config), options, output_types={"tokens": "float16"})
        return TensorrtEngine(path)
    except UhdError as error:
        raise Unavailable(str(error)) from None


def crop_feeds(inputs: Sequence[str], shape: Shape) -> dict[str, np.ndarray]:
    """The graph's inputs for random crops."""
    count, rows, cols = shape
    generator = torch.Generator().manual_seed(rows)
    pixels = torch.randn(count, 3, rows * 14, cols * 14, generator=generator).numpy()
    geometry = crop_geometry(rows, cols)
    return {"pixels": pixels, **{name: geometry[name] for name in inputs if name != "pixels"}}


def tensorrt_encode(engine: TensorrtEngine, shapes: Sequence[Shape]) -> Callable[[], list[np.ndarray]]:
    """Encode all crops, inputs on the device, tokens left there; returns them when called with `fetch`."""
    feeds = []
    for shape in shapes:
        host = crop_feeds(list(engine.inputs), shape)
        placed = {name: DeviceArray.allocate(engine.cuda, a.shape, a.dtype) for name, a in host.items()}
        for name, array in host.items():
            engine.cuda.copy_in(placed[name].address, array)
        engine.cuda.synchronize()
        feeds.append(placed)

    def run(fetch: bool = False) -> list[np.ndarray]:
        tokens = [engine.infer_resident(one)["tokens"] for one in feeds]
        engine.cuda.synchronize()
        return [array.numpy(engine.cuda) for array in tokens] if fetch else []

    return run


def onnxruntime_encode(graph: Path, shapes: Sequence[Shape]) -> Callable[[], list[np.ndarray]]:
    """The same in ONNX Runtime's CUDA provider."""
    import onnxruntime as ort

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise Unavailable("this ONNX Runtime has no CUDA provider; pip install 'uhd-export[cuda]'")
    session = ort.InferenceSession(graph, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
    if "CUDAExecutionProvider" not in session.get_providers():  # its libraries do not load
        raise Unavailable("ONNX Runtime cannot use CUDA here; check the driver and the CUDA libraries")
    bindings = []
    for shape in shapes:
        binding = session.io_binding()
        for name, array in crop_feeds([i.name for i in session.get_inputs()], shape).items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, "cuda"))
        binding.bind_output("tokens", "cuda")
        bindings.append(binding)

    def run(fetch: bool = False) -> list[np.ndarray]:
        for binding in bindings:
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()
        return [b.get_outputs()[0].numpy() for b in bindings] if fetch else []

    return run


class Repeated:
    """One random int4 weight a shape, used by every layer: each has its own copy in the graph."""

    def __init__(self) -> None:
        self._weights: dict[tuple[int, int], QuantizedWeight] = {}

    def describe(self, linear: Linear) -> Description:
        """Symmetric, four bits, in groups of GROUP."""
        return Description(4, GROUP, True, None)

    def load(self, linear: Linear) -> QuantizedWeight:
        """The weight of this shape."""
        shape = linear.outputs, linear.inputs
        if shape not in self._weights:
            dense = np.random.default_rng(shape[0]).standard_normal(shape, np.float32) / shape[1] ** 0.5
            self._weights[shape] = round_to_nearest(dense, GROUP)
        return self._weights[shape]


def emit_int4(config: LanguageConfig, path: Path, dialect: str, context: int) -> Path:
    """A random language model of `config` in int4, its head in float16."""
    width, kv = config.heads * config.head_size, config.kv_heads * config.head_size
    biases = {"q_proj": width, "k_proj": kv, "v_proj": kv}

    def read(name: str) -> torch.Tensor:
        if "norm" in name:
            return torch.ones(config.hidden)
        if name.endswith(".bias"):
            return torch.zeros(biases[name.split(".")[-2]])
        generator = torch.Generator().manual_seed(0)
        return torch.randn(config.vocab, config.hidden, generator=generator) / config.hidden**0.5

    form = Int4Dequantize(Repeated()) if dialect == "tensorrt" else MatMulNBits(Repeated(), accuracy_level=1)
    linear = ByName(form, {"lm_head": Dense()})
    return emit_language(config, read, path, dtype="float16", dialect=dialect, linear=linear, context=context)


def language_engine(
    config: LanguageConfig, folder: Path, kind: str, capability: str, context: int
) -> tuple[Engine, Path]:
    """A random int4 model of `config` on the GPU, and its graph; `kind` is tensorrt or onnxruntime."""
    if kind == "onnxruntime":
        graph = emit_int4(config, folder / f"ort-{config.layers}.onnx", "onnxruntime", context)
        try:
            return open_engine(graph, device="cuda"), graph
        except UhdError as error:
            raise Unavailable(str(error)) from None
    backend = choose_backend(capability)
    graph = emit_int4(config, folder / f"trt-{config.layers}.onnx", "tensorrt", context)
    path = graph.with_suffix(".engine")
    try:
        build_engine(graph, path, language_profiles(config, context), EngineOptions(backend, (capability,)))
        return TensorrtEngine(path), graph
    except UhdError as error:
        raise Unavailable(str(error)) from None


def random_embeds(config: LanguageConfig, count: int) -> np.ndarray:
    """(1, count, D) embeddings."""
    return np.random.default_rng(0).standard_normal((1, count, config.hidden), np.float32)


def language_error(config: LanguageConfig, folder: Path, kind: str, capability: str) -> float:
    """Relative error of the logits of a two-layer cut against ONNX Runtime on the CPU, after 32 positions."""
    cut = replace(config, layers=2)
    embeds = random_embeds(cut, 32)
    engine, graph = language_engine(cut, folder, kind, capability, context=256)
    with engine, open_engine(graph) as host:
        actual, expected = (Decoder(e, 256).prefill(embeds) for e in (engine, host))
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def decode_times(engine: Engine, config: LanguageConfig, context: int, prompt: int, steps: int) -> dict:
    """Seconds of a prefill of `prompt` positions, and of each of `steps` decoded after it."""
    decoder, embeds = Decoder(engine, context), random_embeds(config, prompt + steps)
    begun = time.perf_counter()
    while time.perf_counter() - begun < WARM_SECONDS:
        decoder.rewind(0)
        decoder.prefill(embeds[:, :prompt])
        for i in range(prompt, prompt + 4):
            decoder.step(embeds[0, i])
    decoder.rewind(0)
    start = time.perf_counter()
    decoder.prefill(embeds[:, :prompt])
    first, times = time.perf_counter() - start, []
    for i in range(prompt, prompt + steps):
        begun = time.perf_counter()
        decoder.step(embeds[0, i])
        times.append(time.perf_counter() - begun)
    return {"prefill_seconds": first, "step_seconds": float(np.median(times)), "kv_bytes": decoder.kv_bytes}
