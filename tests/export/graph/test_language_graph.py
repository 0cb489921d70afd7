"""The emitted language graph: both dialects equal PyTorch, weights are streamed, errors leave nothing.

ONNX's reference evaluator runs both: it belongs to no backend.
"""

import weakref

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from safetensors.torch import save_file
from support.contrib_ops import CONTRIB_OPS
from support.tiny_language import CONTEXT, MODELS, difference, embeddings, reader, reference, tiny_model

from uhd_export.checkpoint.reader import Checkpoint
from uhd_export.graph.dialects import DIALECTS, rotary_cache
from uhd_export.graph.language import emit_language
from uhd_export.graph.linear import Dense
from uhd_export.model.language import rotary_tables
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.language.decoder import SEQUENCE_LENGTHS, TOTAL_LENGTH, VISIBLE, WRITE_INDEX

TOLERANCE = {"float32": 5e-6, "float16": 4e-3}


def initializers(path):
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


class Evaluator:
    """Runs a graph of either dialect in ONNX's own reference implementation, carrying the cache along."""

    def __init__(self, path, dtype):
        self.session = ReferenceEvaluator(str(path), new_ops=CONTRIB_OPS)
        self.dtype = np.dtype(dtype)
        inputs = zip(self.session.input_names, self.session.input_types, strict=True)
        self.cache = {
            name: np.zeros([1, *(d.dim_value or CONTEXT for d in kind.tensor_type.shape.dim[1:])], dtype)
            for name, kind in inputs
            if name.startswith("past")
        }

    def run(self, embeds, start):
        total = start + embeds.shape[1]
        feeds = {
            "inputs_embeds": embeds.astype(self.dtype),
            WRITE_INDEX: np.array([start]),
            VISIBLE: np.ones(min(total + 3, CONTEXT), np.bool_),
            SEQUENCE_LENGTHS: np.array([total - 1], np.int32),
            TOTAL_LENGTH: np.array(total, np.int32),
        }
        feeds = {name: feed for name, feed in feeds.items() if name in self.session.input_names}
        values = self.session.run(None, feeds | self.cache)
        results = dict(zip(self.session.output_names, values, strict=True))
        self.cache = {name: results[name.replace("past_key_values", "present")] for name in self.cache}
        assert results["logits"].dtype == np.float32 and results["logits"].shape[:2] == (1, 1)
        return results["logits"][0, 0]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", MODELS)
def test_both_dialects_are_equal_in_onnx_reference(tmp_path, case, dtype):
    model, embeds = tiny_model(*case), embeddings(40)
    expected, evaluators = reference(model, embeds), []
    for dialect in DIALECTS:
        path = tmp_path / f"{dialect}.onnx"
        emit_language(model.config, reader(model), path, dtype=dtype, dialect=dialect)
        evaluators.append(Evaluator(path, dtype))
    # Rewinding, the last, is starting earlier: what the cache holds beyond is overwritten or hidden.
    for start, stop in ((0, 30), (30, 31), (20, 28)):
        ours, other = (evaluator.run(embeds[:, start:stop], start) for evaluator in evaluators)
        assert difference(ours, expected[stop - 1]) < TOLERANCE[dtype]
        assert difference(ours, other) < TOLERANCE[dtype]


def test_the_tensorrt_dialect_is_standard_onnx(tmp_path):
    model = tiny_model(*MODELS[1])
    path = emit_language(model.config, reader(model), tmp_path / "l.onnx", dialect="tensorrt")
    onnx.checker.check_model(str(path), full_check=True)
    assert {d.domain: d.version for d in onnx.load(path, load_external_data=False).opset_import} == {"": 24}


def test_half_precision_norms_are_computed_in_float32(tmp_path):
    model = tiny_model(*MODELS[0])
    for dialect in ("onnxruntime", "tensorrt"):
        path = emit_language(
            model.config, reader(model), tmp_path / "l.onnx", dtype="float16", dialect=dialect
        )
        graph = onnx.load(path).graph
        for node in graph.node:
            if node.op_type == "RMSNormalization" and dialect == "onnxruntime":
                assert {a.name: a.i for a in node.attribute}["stash_type"] == onnx.TensorProto.FLOAT
            elif node.op_type == "RMSNormalization":
                made_by = {name: n for n in graph.node for name in n.output}
                cast = made_by[node.input[0]]
                assert cast.op_type == "Cast" and cast.attribute[0].i == onnx.TensorProto.FLOAT
                assert initializers(path)[node.input[1]].dtype == np.float32


def test_dense_weights_are_stored_transposed_and_only_once(tmp_path):
    model = tiny_model(*MODELS[1])
    path = emit_language(model.config, reader(model), tmp_path / "language.onnx")
    stored, tensors = initializers(path), dict(model.named_parameters())
    for prefix, names in (
        ("model.layers.1.self_attn", ("q_proj", "k_proj", "v_proj")),
        ("model.layers.1.mlp", ("gate_proj", "up_proj")),
        ("model.layers.1.mlp", ("down_proj",)),
    ):
        joint = np.concatenate([tensors[f"{prefix}.{name}.weight"].T for name in names], axis=1)
        assert np.array_equal(stored[f"{prefix}.{'+'.join(names)}.weight"], joint)
    assert np.array_equal(stored["lm_head.weight"], tensors["model.embed_tokens.weight"].T)
    assert "model.embed_tokens.weight" not in stored
    assert (tmp_path / "language.onnx.data").stat().st_size < 1.1 * sum(
        4 * t.numel() for t in tensors.values()
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["language.onnx", "language.onnx.data"]


def test_a_checkpoint_in_bfloat16_gives_the_same_graph(tmp_path):
    model = tiny_model(*MODELS[1])
    halves = {name: p.data.bfloat16() for name, p in model.named_parameters()}
    save_file(halves, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    emit_language(model.config, checkpoint, tmp_path / "a.onnx")
    emit_language(model.config, lambda name: halves[name].float().numpy(), tmp_path / "b.onnx")
    a, b = initializers(tmp_path / "a.onnx"), initializers(tmp_path / "b.onnx")
    assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_a_linear_format_sees_every_layer_and_no_tensor_is_read_early(tmp_path):
    model, reads, seen = tiny_model(*MODELS[1]), [], []

    class Doubling(Dense):
        def emit(self, builder, x, *linears):
            seen.extend((linear.name, linear.tensor, linear.inputs, linear.outputs) for linear in linears)
            assert not reads
            two = builder.constant(np.float32(2))
            return builder.op("Mul", super().emit(builder, x, *linears), two)

    def read(name):
        reads.append(name)
        return reader(model)(name)

    progress = []
    path = emit_language(
        model.config,
        read,
        tmp_path / "l.onnx",
        linear=Doubling(),
        dialect="tensorrt",
        progress=lambda done, total: progress.append((done, total)),
    )
    parts = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    names = [f"model.layers.{i}.{part}" for i in range(2) for part in parts] + ["lm_head"]
    assert [s[0] for s in seen] == names
    assert seen[1] == ("model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.k_proj.weight", 128, 64)
    assert seen[-1] == ("lm_head", "model.embed_tokens.weight", 128, 300)
    assert sorted(reads) == sorted(name for name, _ in model.named_parameters())  # each tensor once
    total = progress[0][1]
    assert [done for done, _ in progress] == list(range(total))
    # All products, four a layer and the head; tensors under a kilobyte lie in the model itself.
    assert total > 2 * 4 + 1

    doubled = tiny_model.__wrapped__(*MODELS[1])
    for name, parameter in doubled.named_parameters():
        if "_proj.weight" in name:
            parameter.data *= 2
    embeds = embeddings(5)
    expected = 2 * reference(doubled, embeds)[-1]
    assert difference(Evaluator(path, "float32").run(embeds, 0), expected) < TOLERANCE["float32"]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_one_tensor_is_held_at_a_time(tmp_path, dtype):
    model, living = tiny_model(*MODELS[0]), []

    def read(name):
        assert all(ref() is None for ref in living), f"another tensor is still held when {name} is read"
        tensor = reader(model)(name).clone()
        living.append(weakref.ref(tensor.untyped_storage()))
        living.append(weakref.ref(tensor))
        return tensor

    emit_language(model.config, read, tmp_path / "l.onnx", dtype=dtype)
    assert len(living) == 2 * len(list(model.parameters())) - 2  # all but the embedding


@given(st.integers(1, 4096), st.sampled_from([64, 128]), st.sampled_from([1e4, 1e6]))
def test_rotary_tables_agree_with_pytorch(position, head_size, theta):
    from dataclasses import replace

    config = replace(tiny_model(*MODELS[0]).config, head_size=head_size, rope_theta=theta)
    cos, sin = (table[-1] for table in rotary_cache(config, position + 1))
    np.testing.assert_allclose(cos**2 + sin**2, 1, atol=1e-12)
    angles = torch.tensor([position])
    # PyTorch's angles are float32: at position 4096 they are off by up to 4096 * 2^-24 * 2.
    for ours, theirs in zip((cos, sin), rotary_tables(config, angles), strict=True):
        np.testing.assert_allclose(ours, theirs[0], atol=1e-6 + position * 2.0**-23)


def broken(name, tensor):
    """A reader in which one tensor is replaced."""
    whole = reader(tiny_model(*MODELS[0]))
    return lambda asked: tensor if asked == name else whole(asked)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat16"}, "language dtype: 'bfloat16' is not supported; use one of float32, float16"),
        ({"dialect": "coreml"}, "language dialect: 'coreml' is not supported"),
        ({"context": CONTEXT + 1}, f"language context: {CONTEXT + 1} positions; .* 1 to {CONTEXT}"),
        ({"context": 0}, "language context: 0 positions"),
        (
            {"tensors": broken("lm_head.weight", torch.zeros(300, 64))},
            r"tensor lm_head.weight: shape \[300, 64\]",
        ),
        (
            {"tensors": broken("model.norm.weight", torch.full((128,), 1e5)), "dtype": "float16"},
            "tensor model.norm.weight: holds values that float16 cannot represent",
        ),
        (
            {"tensors": broken("model.norm.weight", torch.full((128,), torch.nan))},
            "tensor model.norm.weight: holds values that float cannot represent",
        ),
    ],
)
def test_errors_name_their_field_and_leave_nothing(tmp_path, options, message):
    model = tiny_model(*MODELS[0])
    options = {"tensors": reader(model)} | options
    with pytest.raises(UhdError, match=message):
        emit_language(model.config, path=tmp_path / "l.onnx", **options)
    assert not list(tmp_path.iterdir())
