"""Group-quantized weights: packing, conventions, and what ONNX Runtime computes from them."""

import json

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from uhd_export.checkpoint.int4.gptq import GptqCheckpoint, open_checkpoint
from uhd_export.checkpoint.int4.linears import largest_group
from uhd_export.checkpoint.int4.weight import QuantizedWeight, check_group, round_to_nearest
from uhd_export.checkpoint.int4.words import group_order, pack_gptq, unpack_gptq
from uhd_export.graph.int4.formats import ByName, GptqWeights, Int4Dequantize, MatMulNBits, RoundedWeights
from uhd_export.graph.linear import Dense, Linear, TensorSource
from uhd_export.model.language import SelfAttention
from uhd_export.plugins.graph import GraphBuilder
from uhd_export.runtime.config import LanguageConfig
from uhd_export.runtime.errors import UhdError


@st.composite
def weights(draw, bits=4, groups=(32, 64, 128), symmetric=None, ordered=None):
    """A quantized weight of any codes, zero points and scales."""
    group, count = draw(st.sampled_from(groups)), draw(st.integers(1, 5))
    n = 8 * draw(st.integers(1, 6))
    symmetric = draw(st.booleans()) if symmetric is None else symmetric
    ordered = draw(st.booleans()) if ordered is None else ordered
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    zeros = np.full((n, count), 1 << (bits - 1)) if symmetric else rng.integers(0, 1 << bits, (n, count))
    return QuantizedWeight(
        rng.integers(0, 1 << bits, (n, group * count), dtype=np.uint8),
        (rng.random((n, count)) / 32 + 1e-3).astype(np.float16).astype(np.float32),
        zeros.astype(np.uint8),
        bits,
        _act_order(rng, group * count, group) if ordered and count > 1 else None,
    )


def _act_order(rng, k, group):
    """A random order, as GPTQ's g_idx can express it: inputs of one group in rising order."""
    return np.argsort(rng.permutation(k) // group, kind="stable")


def _formula(parts, form):
    """W[n, k] = scale * (code - zero), one element at a time with Python integers."""
    qweight, qzeros, scales, g_idx = (parts[name] for name in ("qweight", "qzeros", "scales", "g_idx"))
    k, n = qweight.shape[0] * 8, qweight.shape[1]
    out = np.empty((n, k), np.float32)
    for row in range(n):
        for column in range(k):
            group = int(g_idx[column])
            code = (int(qweight[column // 8, row]) >> 4 * (column % 8)) & 15
            word = int(qzeros[group, row // 8]) % 2**32
            if form == "gptq":
                word = (word + 0x11111111) % 2**32
            zero = (word >> 4 * (row % 8)) & 15
            out[row, column] = np.float32(scales[group, row]) * np.float32(code - zero)
    return out


@given(weights(), st.sampled_from(["gptq", "gptq_v2"]))
def test_gptq_words_keep_every_value(weight, form):
    parts = pack_gptq(weight, form)
    back = unpack_gptq(parts["qweight"], parts["qzeros"], parts["scales"], parts["g_idx"], form)
    np.testing.assert_array_equal(back.codes, weight.codes)
    np.testing.assert_array_equal(back.zeros, weight.zeros)
    np.testing.assert_array_equal(back.scales, weight.scales)
    np.testing.assert_array_equal(back.dequantize(), weight.dequantize())
    assert (back.order is None) == (weight.order is None)


@settings(max_examples=10)
@given(weights(groups=(32,)), st.sampled_from(["gptq", "gptq_v2"]))
def test_dequantized_values_follow_the_formula(weight, form):
    parts = pack_gptq(weight, form)
    back = unpack_gptq(parts["qweight"], parts["qzeros"], parts["scales"], parts["g_idx"], form)
    np.testing.assert_array_equal(back.dequantize(), _formula(parts, form))


@settings(max_examples=20)
@given(st.data(), st.sampled_from(["gptq", "gptq_v2"]))
def test_dequantized_values_are_those_of_the_library(data, form):
    torch_linear = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch", exc_type=ImportError)
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    weight = data.draw(weights())
    n, k = weight.codes.shape
    n = n // 8 * 32  # the library packs multiples of 32 outputs
    weight = QuantizedWeight(
        *(np.resize(a, (n, a.shape[1])) for a in (weight.codes, weight.scales, weight.zeros)), 4, weight.order
    )
    parts = pack_gptq(weight, form)
    layer = torch_linear.TorchLinear(
        bits=4, group_size=weight.group, sym=weight.symmetric, desc_act=weight.order is not None,
        in_features=k, out_features=n, bias=False, register_buffers=True, pack_dtype=torch.int32,
    )  # fmt: skip
    layer.load_state_dict({name: torch.from_numpy(a) for name, a in parts.items()})
    if form == "gptq":
        convert_gptq_v1_to_v2_format_module(layer, bits=4, pack_dtype=torch.int32)
    layer.scales = layer.scales.float()
    layer.optimized = True  # else it compiles itself for each shape
    layer.post_init()
    theirs = layer.eval().dequantize_weight().T.numpy()
    back = unpack_gptq(parts["qweight"], parts["qzeros"], parts["scales"], parts["g_idx"], form)
    assert theirs.dtype == np.float32
    np.testing.assert_array_equal(back.dequantize(), theirs)


class _Fixed:
    """A weight source with one weight."""

    def __init__(self, weight):
        self.weight = weight

    def describe(self, linear):
        from uhd_export.graph.int4.formats import Description

        return Description(self.weight.bits, self.weight.group, self.weight.symmetric, self.weight.order)

    def load(self, linear):
        return self.weight


def _emit(form, path, n, k, tensors=None, dtype=ir.DataType.FLOAT, name="layer"):
    """A model of one linear layer in format `form`."""
    builder = GraphBuilder("linear")
    x = builder.input("x", dtype, ("rows", k))
    source = TensorSource(lambda name: tensors[name])
    y = form.emit(builder, x, Linear(name, f"{name}.weight", k, n, dtype, source))
    builder.output(y, "y", dtype, ("rows", n))
    builder.save(path)
    return path


def _run(path, x):
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def _initializers(path):
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(str(path)).graph.initializer}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("int4")


@settings(max_examples=25)
@given(weights())
def test_matmul_nbits_computes_the_dense_product(folder, weight):
    n, k = weight.codes.shape
    path = _emit(MatMulNBits(_Fixed(weight), accuracy_level=1), folder / "nbits.onnx", n, k)
    x = np.random.default_rng(0).standard_normal((3, k), dtype=np.float32)
    expected = x.astype(np.float64) @ weight.dequantize().astype(np.float64).T
    np.testing.assert_allclose(_run(path, x), expected, atol=1e-4)


@settings(max_examples=25)
@given(weights())
def test_matmul_nbits_tensors_hold_every_value(folder, weight):
    n, k = weight.codes.shape
    tensors = _initializers(_emit(MatMulNBits(_Fixed(weight)), folder / "tensors.onnx", n, k))
    packed = tensors["layer.B"]
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(n, -1, weight.group)
    if "layer.zero_points" in tensors:
        octets = tensors["layer.zero_points"]
        zeros = np.stack([octets & 15, octets >> 4], -1).reshape(n, -1)[:, : codes.shape[1]]
    else:
        zeros = np.full(codes.shape[:2], 8)
    values = tensors["layer.scales"][:, :, None] * (codes.astype(np.float32) - zeros[:, :, None])
    order = weight.order if weight.order is not None else np.arange(k)
    np.testing.assert_array_equal(values.reshape(n, k), weight.dequantize()[:, order])


@settings(max_examples=10)
@given(weights(bits=8, ordered=False))
def test_eight_bits_for_the_head(folder, weight):
    n, k = weight.codes.shape
    path = _emit(MatMulNBits(_Fixed(weight), accuracy_level=1), folder / "head.onnx", n, k)
    x = np.random.default_rng(1).standard_normal((2, k), dtype=np.float32)
    expected = x.astype(np.float64) @ weight.dequantize().astype(np.float64).T
    np.testing.assert_allclose(_run(path, x), expected, atol=2e-3)


@settings(max_examples=25)
@given(weights(symmetric=True))
def test_int4_dequantize_linear_gives_the_same_weight(folder, weight):
    n, k = weight.codes.shape
    path = _emit(Int4Dequantize(_Fixed(weight)), folder / "dq.onnx", n, k)
    order = weight.order if weight.order is not None else np.arange(k)
    model = ir.load(path)
    dequantize = next(node for node in model.graph if node.op_type == "DequantizeLinear")
    matrix = dequantize.outputs[0]
    matrix.name, matrix.type, matrix.shape = "matrix", ir.TensorType(ir.DataType.FLOAT), ir.Shape([k, n])
    model.graph.outputs.append(matrix)
    ir.save(model, folder / "dq2.onnx")
    session = ort.InferenceSession(str(folder / "dq2.onnx"), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(2).standard_normal((3, k), dtype=np.float32)
    y, matrix = session.run(["y", "matrix"], {"x": x})
    np.testing.assert_array_equal(matrix.T, weight.dequantize()[:, order])
    np.testing.assert_allclose(y, x @ weight.dequantize().T, atol=1e-4)


@given(weights(symmetric=False))
def test_tensorrt_refuses_zero_points(folder, weight):
    if not weight.symmetric:
        with pytest.raises(UhdError, match=r"layer layer: .*sym=True"):
            _emit(Int4Dequantize(_Fixed(weight)), folder / "no.onnx", *weight.codes.shape)


@given(st.sampled_from([32, 64, 128]), st.sampled_from([4, 8]), st.booleans(), st.integers(0, 2**32 - 1))
def test_rounding_stays_within_half_a_step(group, bits, symmetric, seed):
    rng = np.random.default_rng(seed)
    dense = (rng.standard_normal((16, group * 3)) * rng.random((16, 1))).astype(np.float32)
    weight = round_to_nearest(dense, group, bits=bits, symmetric=symmetric)
    assert weight.group == group
    assert not symmetric or weight.symmetric
    step = np.repeat(weight.scales, group, axis=1)
    # A symmetric grid has no code for its upper end, half a step above the last one.
    assert (np.abs(weight.dequantize() - dense) <= step * (0.5 + 2**-10 * (1 << bits))).all()


def test_rounding_keeps_values_of_its_own_grid():
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 16, (8, 96), dtype=np.uint8)
    codes[:, ::32], codes[:, 1::32] = 0, 15  # each group spans the whole range
    scales = np.full((8, 3), 0.25, np.float32)
    dense = QuantizedWeight(codes, scales, np.full((8, 3), 8, np.uint8)).dequantize()
    asymmetric = round_to_nearest(dense, 32, symmetric=False)
    np.testing.assert_array_equal(asymmetric.dequantize(), dense)
    zero = round_to_nearest(np.zeros((8, 32), np.float32), 32)
    np.testing.assert_array_equal(zero.dequantize(), 0)


def test_rounding_refuses_what_scales_cannot_hold():
    with pytest.raises(UhdError, match="float16 scales"):
        round_to_nearest(np.full((8, 32), 1e7, np.float32), 32)


def test_group_sizes_that_do_not_fit_are_named():
    with pytest.raises(UhdError, match=r"group size 128: does not divide the 352 inputs of mlp; use 32"):
        check_group("mlp", 352, 128)
    with pytest.raises(UhdError, match="must be one of 32, 64, 128"):
        check_group("mlp", 352, 48)


def test_groups_of_unequal_size_are_refused():
    with pytest.raises(UhdError, match="groups of the stated size"):
        group_order(np.array([0] * 33 + [1] * 31), 64, 2)


def test_larger_groups_are_split_without_changing_a_value():
    weight = round_to_nearest(np.random.default_rng(4).standard_normal((8, 512), dtype=np.float32), 512)
    small = weight.regroup(128)
    assert small.group == 128
    np.testing.assert_array_equal(small.dequantize(), weight.dequantize())


def _write(folder, tensors, settings):
    folder.mkdir(exist_ok=True)
    save_file({name: torch.as_tensor(a) for name, a in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings} if settings else {}))
    return folder


SETTINGS = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": True}


@pytest.fixture
def layer():
    rng = np.random.default_rng(5)
    weight = round_to_nearest(rng.standard_normal((16, 96), dtype=np.float32), 32, symmetric=False)
    return QuantizedWeight(weight.codes, weight.scales, weight.zeros, 4, _act_order(rng, 96, 32))


@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
def test_a_gptq_checkpoint_reads_like_a_plain_one(tmp_path, layer, form):
    tensors = {f"a.q.{name}": part for name, part in pack_gptq(layer, form).items()}
    tensors |= {"a.q.bias": np.zeros(16, np.float16), "norm.weight": np.ones(4, np.float32)}
    folder = _write(tmp_path / "checkpoint", tensors, SETTINGS | {"checkpoint_format": form})
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, GptqCheckpoint)
    assert checkpoint.names() == {"a.q.weight", "norm.weight"}
    assert checkpoint.shape("a.q.weight") == (16, 96)
    assert checkpoint.shape("norm.weight") == (4,)
    np.testing.assert_array_equal(checkpoint.tensor("a.q.weight").numpy(), layer.dequantize())
    assert checkpoint.tensor("a.q.weight", torch.float16).dtype == torch.float16
    assert not checkpoint.symmetric("a.q")
    source = TensorSource(checkpoint)
    x = np.random.default_rng(6).standard_normal((2, 96), dtype=np.float32)
    builder = GraphBuilder("linear")
    value = builder.input("x", ir.DataType.FLOAT, ("rows", 96))
    linear = Linear("a.q", "a.q.weight", 96, 16, ir.DataType.FLOAT, source)
    y = MatMulNBits(GptqWeights(checkpoint), accuracy_level=1).emit(builder, value, linear)
    builder.output(y, "y", ir.DataType.FLOAT, ("rows", 16))
    builder.save(tmp_path / "gptq.onnx")
    np.testing.assert_allclose(_run(tmp_path / "gptq.onnx", x), x @ layer.dequantize().T, atol=1e-4)


# As optimum 2.3.0 with gptqmodel 7.6.0 writes them: with sym=True its zero points are of version 1.
OPTIMUM = {
    "act_group_aware": True, "bits": 4, "damp_percent": 0.1, "dataset": ["a text"], "desc_act": False,
    "format": "gptq_v2", "group_size": 32, "meta": {"quantizer": ["optimum:2.3.0", "gptqmodel:7.6.0"]},
    "modules_in_block_to_quantize": None, "quant_method": "gptq", "sym": True, "true_sequential": True,
}  # fmt: skip


@pytest.mark.parametrize("written", ["gptq", "gptq_v2"])
def test_zero_points_of_symmetric_checkpoints_tell_their_version(tmp_path, written):
    weight = round_to_nearest(np.random.default_rng(5).standard_normal((16, 96), dtype=np.float32), 32)
    parts = pack_gptq(weight, written)
    word = {"gptq": 0x77777777, "gptq_v2": 0x88888888}[written]
    assert (parts["qzeros"].view(np.uint32) == word).all()
    tensors = {f"{name}.{part}": a.copy() for name in ("q", "k") for part, a in parts.items()}
    checkpoint = open_checkpoint(_write(tmp_path / "optimum", tensors, OPTIMUM))
    assert checkpoint.symmetric("q")
    np.testing.assert_array_equal(checkpoint.tensor("q.weight").numpy(), weight.dequantize())


@pytest.mark.parametrize("other", ["another version", "no middle"])
def test_zero_points_that_contradict_the_config_are_named(tmp_path, layer, other):
    parts = pack_gptq(round_to_nearest(np.ones((16, 96), np.float32), 32))
    tensors = {f"k.{part}": a for part, a in parts.items()}
    odd = layer if other == "no middle" else round_to_nearest(np.ones((16, 96), np.float32), 32)
    tensors |= {f"q.{part}": a for part, a in pack_gptq(odd, "gptq_v2").items()}
    with pytest.raises(UhdError, match=r"quantization_config\.sym is true, but tensor q\.qzeros"):
        open_checkpoint(_write(tmp_path / "mixed", tensors, OPTIMUM))


def test_biases_of_zeros_of_a_model_that_has_biases_are_read(tmp_path):
    """Left out of the names, as AutoGPTQ adds them to layers without one, and yet there for Qwen2."""
    shape = LanguageConfig("qwen2", 64, 64, 1, 2, 1, 32, 9, 9, 1e-5, 1e4, False, 1, (2,))
    model = SelfAttention(shape)
    tensors = {}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        weight = round_to_nearest(model.get_submodule(name).weight.detach().numpy(), 32)
        tensors |= {f"{name}.{part}": a for part, a in pack_gptq(weight).items()}
    tensors |= {"q_proj.bias": np.zeros(64), "k_proj.bias": np.zeros(32), "v_proj.bias": np.arange(32.0)}
    checkpoint = open_checkpoint(
        _write(tmp_path / "qwen2", tensors, SETTINGS | {"checkpoint_format": "gptq"})
    )
    assert "v_proj.bias" in checkpoint.names()
    checkpoint.load_into(model, "", torch.float32)
    assert not model.q_proj.bias.any()
    np.testing.assert_array_equal(model.v_proj.bias, np.arange(32))
    checkpoint.refuse_unknown(
        {f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj")} | {"v_proj.bias"}
    )


def test_settings_beside_the_config_are_read(tmp_path, layer):
    folder = _write(tmp_path / "old", {f"q.{k}": v for k, v in pack_gptq(layer).items()}, None)
    assert open_checkpoint(folder).names() == {f"q.{k}" for k in pack_gptq(layer)}
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32}))
    assert open_checkpoint(folder).names() == {"q.weight"}


@pytest.mark.parametrize(
    "change", [{"bits": 3}, {"quant_method": "awq"}, {"format": "marlin"}, {"pack_dtype": "int16"}]
)
def test_other_quantized_checkpoints_are_refused(tmp_path, layer, change):
    tensors = {f"q.{k}": v for k, v in pack_gptq(layer).items()}
    folder = _write(tmp_path / "other", tensors, SETTINGS | change)
    with pytest.raises(UhdError, match=rf"quantization_config\.{next(iter(change))}"):
        open_checkpoint(folder)


def test_a_checkpoint_that_only_claims_to_be_gptq_is_refused(tmp_path):
    folder = _write(tmp_path / "claims", {"q.weight": np.ones((4, 4), np.float32)}, SETTINGS)
    with pytest.raises(UhdError, match="no qweight"):
        open_checkpoint(folder)


def test_a_layer_of_another_shape_is_named(tmp_path, layer):
    tensors = {f"q.{k}": v for k, v in pack_gptq(layer).items()}
    checkpoint = open_checkpoint(_write(tmp_path / "shape", tensors, SETTINGS))
    linear = Linear("q", "q.weight", 64, 16, ir.DataType.FLOAT, TensorSource(checkpoint))
    with pytest.raises(UhdError, match=r"layer q: .*\[16, 96\]"):
        GptqWeights(checkpoint).describe(linear)


def test_rounded_weights_and_formats_by_name(tmp_path):
    rng = np.random.default_rng(7)
    dense = rng.standard_normal((16, 128), dtype=np.float32)
    tensors = {"layer.weight": dense, "lm_head.weight": dense}
    form = ByName(MatMulNBits(RoundedWeights(64), accuracy_level=1), {"lm_head": Dense()})
    x = rng.standard_normal((2, 128), dtype=np.float32)
    rounded = _run(_emit(form, tmp_path / "layer.onnx", 16, 128, tensors), x)
    np.testing.assert_allclose(rounded, x @ round_to_nearest(dense, 64).dequantize().T, atol=1e-4)
    assert np.abs(rounded - x @ dense.T).max() > 1e-2
    plain = _run(_emit(form, tmp_path / "head.onnx", 16, 128, tensors, name="lm_head"), x)
    np.testing.assert_allclose(plain, x @ dense.T, atol=1e-4)


@pytest.mark.parametrize("level", [1, 4])
def test_half_precision_activations(tmp_path, level):
    rng = np.random.default_rng(8)
    dense = rng.standard_normal((32, 128), dtype=np.float32)
    form = MatMulNBits(RoundedWeights(32), accuracy_level=level)
    path = _emit(form, tmp_path / "half.onnx", 32, 128, {"layer.weight": dense}, ir.DataType.FLOAT16)
    x = rng.standard_normal((2, 128)).astype(np.float16)
    expected = x.astype(np.float32) @ round_to_nearest(dense, 32).dequantize().T
    error = np.abs(_run(path, x).astype(np.float32) - expected)
    assert error.max() < (0.05 if level == 1 else 0.5)


def test_a_group_that_does_not_divide_is_refused_while_the_graph_is_described(tmp_path):
    with pytest.raises(UhdError, match="group size 128: does not divide the 96 inputs of layer"):
        _emit(MatMulNBits(RoundedWeights(128)), tmp_path / "no.onnx", 8, 96, {})


@pytest.mark.parametrize(
    ("hidden", "intermediate", "group"),
    [(4096, 11008, 128), (3584, 18944, 128), (128, 384, 32), (256, 512, 64), (96, 160, 32)],
)
def test_the_largest_group_that_fits(hidden, intermediate, group):
    shape = LanguageConfig("llama", hidden, intermediate, 1, 1, 1, hidden, 9, 9, 1e-5, 1e4, False, 1, (2,))
    assert largest_group(shape) == group
    odd = LanguageConfig("llama", 100, intermediate, 1, 1, 1, 100, 9, 9, 1e-5, 1e4, False, 1, (2,))
    with pytest.raises(UhdError, match="none of 32, 64, 128 divides all of 100"):
        largest_group(odd)
