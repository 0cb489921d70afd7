"""Which kernels TensorRT-RTX makes of a language layer, and what they read, as it describes the engine.

That is logged in a build, which takes no GPU: one layer of width 1024 with heads of 128, float16.
"""

import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from uhd_export.graph.cache import FloatCache
from uhd_export.graph.language import emit_language
from uhd_export.runtime.config import LanguageConfig
from uhd_export.tensorrt import EngineOptions, build_engine, builder, language_profiles

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install -e '.[dev]'")
HEADS, SIZE, CONTEXT, VOCAB = 8, 128, 2048, 2048
CONFIG = LanguageConfig(
    kind="llama",
    hidden=HEADS * SIZE,
    intermediate=2816,
    layers=1,
    heads=HEADS,
    kv_heads=HEADS,
    head_size=SIZE,
    vocab=VOCAB,
    context=CONTEXT,
    eps=1e-5,
    rope_theta=10000.0,
    tied=False,
    bos=1,
    eos=(2,),
)


@dataclass(frozen=True)
class Kernel:
    """One launch: its name, its kind and code, and what it reads and writes, (name, dims, type) each."""

    name: str
    kind: str
    tactic: str
    inputs: list[tuple[str, tuple[int, ...], str]]
    outputs: list[tuple[str, tuple[int, ...], str]]


@dataclass(frozen=True)
class Profile:
    """The kernels of one optimization profile, and bytes of activations."""

    kernels: list[Kernel]
    activation_bytes: int

    def attention(self) -> Kernel:
        (kernel,) = (kernel for kernel in self.kernels if "_mha_" in kernel.name)
        return kernel

    def written(self) -> list[tuple[str, tuple[int, ...], str]]:
        return [tensor for kernel in self.kernels for tensor in kernel.outputs]


def tensors(text):
    found = re.findall(r"Name: ([^,]+), Dimensions: \[([-\d,]*)\].*?Datatype: (\w+)", text)
    return [
        (re.sub(r" \[profile \d+\]", "", name), tuple(int(d) for d in dims.split(",") if d), kind)
        for name, dims, kind in found
    ]


def read(lines):
    """The profiles that the log describes."""
    kernels, sizes = {}, [int(n) for n in re.findall(r"Total Activation Memory: (\d+)", "\n".join(lines))]
    head = r"Name: ([^,]+_myl(\d+)_\d+), LayerType: (\w+), Inputs: \[(.*?)\], Constants"
    pattern = re.compile(head + r".*?(?:Outputs: \[(.*?)\], )?TacticName: (\S*?),")
    for line in "\n".join(lines).splitlines():
        found = pattern.match(line)
        if found:
            name, profile, kind, inputs, outputs, tactic = found.groups()
            kernel = Kernel(name, kind, tactic, tensors(inputs), tensors(outputs or ""))
            kernels.setdefault(int(profile), {})[name] = kernel
    return [Profile(list(kernels[i].values()), sizes[i]) for i in sorted(kernels)]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """`built(accumulation)`: the profiles of the engine, by name."""
    folder, cache = tmp_path_factory.mktemp("kernels"), {}
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "o_proj": (1024, 1024),
        "gate_proj": (2816, 1024),
        "up_proj": (2816, 1024),
        "down_proj": (1024, 2816),
        "lm_head": (VOCAB, 1024),
    }

    def weights(name):
        if "norm" in name:
            return torch.ones(1024)
        shape = next((shape for part, shape in shapes.items() if part in name), (1024, 1024))
        return 0.03 * torch.randn(shape, generator=generator)

    def build(accumulation):
        if accumulation in cache:
            return cache[accumulation]
        lines = []

        class Log(trt.ILogger):
            def __init__(self):
                trt.ILogger.__init__(self)

            def log(self, severity, message):
                lines.append(message)

        def configure(*arguments):
            config = plain(*arguments)
            config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
            return config

        log, plain, profiles = Log(), builder._configure, language_profiles(CONFIG, CONTEXT)
        graph = folder / f"{accumulation}.onnx"
        emit_language(
            CONFIG,
            weights,
            graph,
            dtype="float16",
            dialect="tensorrt",
            context=CONTEXT,
            cache=FloatCache("float16", accumulation),
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(builder, "logger", lambda trt: log)
            patch.setattr(builder, "_configure", configure)
            options = EngineOptions(compute_capabilities=("8.9",), plugins=False)
            build_engine(graph, folder / f"{accumulation}.engine", profiles, options)
        described = read(lines)
        assert len(described) == len(profiles)
        cache[accumulation] = {p.name: one for p, one in zip(profiles, described, strict=True)}
        return cache[accumulation]

    return build


@pytest.mark.parametrize("accumulation", ["float32", "float16"])
def test_attention_is_one_fused_kernel_in_each_profile(built, accumulation):
    profiles = built(accumulation)
    assert list(profiles) == ["decode 512", "decode 2048", "prefill"]
    names = {name: re.sub(r"_myl.*", "", profile.attention().name) for name, profile in profiles.items()}
    assert names == {
        "decode 512": "_gemv_mha_v1",
        "decode 2048": "_gemv_mha_v1",
        "prefill": "_gemm_mha_v2",
    }


def test_adding_up_in_float32_converts_one_position_and_never_the_cache(built):
    """The casts of keys and values are no work: the kernels read them in float16, and are others."""
    narrow = built("float16")
    for name, profile in built("float32").items():
        kernel = profile.attention()
        assert kernel.tactic != narrow[name].attention().tactic
        assert {kind for _, dims, kind in kernel.inputs if len(dims) > 2 and SIZE in dims} == {"Half"}, name
        wide = [dims for _, dims, kind in profile.written() if kind == "Float" and SIZE in dims]
        assert all(np.prod(dims) == HEADS * SIZE for dims in wide), name


def test_all_of_the_cache_is_read_where_it_lies_and_a_part_of_it_is_copied(built):
    """What `visible_sizes` reckons with."""
    profiles = built("float32")
    whole, part = (1, HEADS, CONTEXT, SIZE), (1, HEADS, 512, SIZE)

    def caches(profile, dims):
        return [name for name, shape, _ in profile.written() if shape == dims and "present" not in name]

    read = {name for name, dims, _ in profiles["decode 2048"].attention().inputs if dims == whole}
    assert read == {"present.0.key", "present.0.value"}
    assert caches(profiles["decode 2048"], whole) == []
    assert len(caches(profiles["decode 512"], part)) == 2
    assert caches(profiles["decode 512"], whole) == []


def test_q_k_v_are_one_product_and_gate_and_up_another(built):
    for name, profile in built("float32").items():
        products = [k.name for k in profile.kernels if k.kind == "gemm" or "FcAdd" in k.name]
        assert len(products) == 5, (name, products)  # and o, down, the head


def test_the_greedy_token_and_the_sum_of_logits_take_one_kernel(built):
    for name, profile in built("float32").items():
        (last,) = (
            k
            for k in profile.kernels
            if any(n.startswith("logits") for n, *_ in k.outputs) and k.kind == "kgen"
        )
        assert {"logits", "logits_sum", "token"} <= {n for n, *_ in last.outputs}, (name, last)


def test_activations_are_bounded(built):
    profiles = built("float32")
    # Keys and values of a part; beyond that a decoding step holds what is small.
    part = 2 * 2 * HEADS * 512 * SIZE
    assert profiles["decode 512"].activation_bytes < part + 10e6
    assert profiles["decode 2048"].activation_bytes < 10e6
    # The widest of a prompt of 2048 positions, twice, and the mask.
    assert profiles["prefill"].activation_bytes < 2 * 2 * CONTEXT * 2 * 2816 + 4 * CONTEXT**2
