"""The vision part in 8 bits: rounding as ONNX Runtime does it, exact smoothing, and what stays dense."""

from contextlib import closing

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from uhd_export.bundle.options import BuildOptions
from uhd_export.checkpoint.options import ImageOptions
from uhd_export.checkpoint.reader import Checkpoint
from uhd_export.graph.int8 import calibrate
from uhd_export.graph.int8.rounding import relative_error, round_activations, round_weight, rounded_product
from uhd_export.graph.int8.smoothing import factors, groups
from uhd_export.graph.products import Product
from uhd_export.graph.vision import emit_vision
from uhd_export.plugins.graph import GraphBuilder
from uhd_export.runtime.engines.onnxruntime import OrtEngine
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.encoder import VisionEncoder
from uhd_export.runtime.image.pattern import pattern

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("low, high", [(-3.0, 5.0), (1.0, 2.0), (-4.0, -1.0)])
def test_activations_are_rounded_as_onnx_runtime_rounds_them(tmp_path, low, high):
    b = GraphBuilder("round")
    x = b.input("x", ir.DataType.FLOAT, ["n"])
    b.output(b.op("DequantizeLinear", *b.ops("DynamicQuantizeLinear", x, outputs=3)), "y")
    b.save(tmp_path / "round.onnx")
    values = RNG.uniform(low, high, 1000).astype(np.float32)
    expected = ort.InferenceSession(tmp_path / "round.onnx").run(None, {"x": values})[0]
    actual = round_activations(values, float(values.min()), float(values.max()))
    # A value in the middle between two codes may go either way.
    assert (abs(actual - expected) > 1e-5).sum() <= 2
    assert abs(actual - values).max() <= (max(high, 0) - min(low, 0)) / 255


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_column_of_zeros_has_a_scale(dtype):
    weight = RNG.standard_normal((8, 3)).astype(np.float32)
    weight[:, 1], weight[:, 2] = 0, weight[:, 2] * 1e-6
    codes, scales = round_weight(weight, dtype)
    assert (scales > 0).all() and abs(codes).max() <= 127
    assert abs(codes * scales.astype(np.float32) - weight)[:, 0].max() <= scales[0]


def test_smoothing_moves_outliers_and_rounds_nothing():
    x = RNG.standard_normal((64, 32)).astype(np.float32)
    x[:, 5] *= 100
    weight = RNG.standard_normal((32, 16)).astype(np.float32)
    weight[5] /= 50
    factor = factors(abs(x).max(0), weight, 0.5)
    assert factor[5] > 4 * np.median(factor)
    assert ((x / factor) * factor == x).all() and (
        (weight * factor[:, None]) / factor[:, None] == weight
    ).all()

    def error(x, weight):
        return relative_error(rounded_product(x, x.min(0), x.max(0), weight), x @ weight)

    assert error(x / factor, weight * factor[:, None]) < error(x, weight) / 2


@pytest.fixture
def planned(golden_model, golden_checkpoint, tmp_path):
    """`planned()`: (configuration, checkpoint, plan), calibrated on one small image."""
    config = golden_model(mask=3).config
    with closing(Checkpoint(golden_checkpoint)) as checkpoint:

        def plan():
            settings, image = config.settings(ImageOptions()), pattern(150, 100)
            return (
                config,
                checkpoint,
                calibrate.calibrate_vision(config, checkpoint, settings, [image], tmp_path),
            )

        yield plan
    assert not list(tmp_path.glob(".observed*"))


def tokens(config, path):
    with OrtEngine(path) as engine:
        return VisionEncoder(engine, config.model).encode([np.asarray(pattern(140, 98))], "selective")[0]


def relative(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def test_every_product_in_8_bits(planned, tmp_path):
    config, checkpoint, plan = planned()
    assert not plan.record.dense and plan.record.images == 1
    assert len(plan.record.int8) == 4 * config.vision.layers + 2 + 3  # and two levels' norms, out, cat, proj
    assert set(plan.smoothing) == set(groups(config.vision))
    paths = {name: tmp_path / f"{name}.onnx" for name in ("exact", "smoothed", "dynamic", "static")}
    emit_vision(config, checkpoint, paths["exact"])
    view = plan.view(checkpoint)
    emit_vision(config, view, paths["smoothed"])
    for name, dialect in (("dynamic", "onnxruntime"), ("static", "tensorrt")):
        emit_vision(config, view, paths[name], products=plan.products(dialect))
    exact = tokens(config, paths["exact"])
    assert relative(tokens(config, paths["smoothed"]), exact) < 1e-6
    assert 1e-4 < relative(tokens(config, paths["dynamic"]), exact) < 5e-2
    assert 1e-4 < relative(tokens(config, paths["static"]), exact) < 5e-2


def test_products_run_in_one_kernel(planned, tmp_path):
    config, checkpoint, plan = planned()
    emit_vision(config, plan.view(checkpoint), tmp_path / "v.onnx", products=plan.products("onnxruntime"))
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    ort.InferenceSession(tmp_path / "v.onnx", options)
    nodes = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert nodes.count("DynamicQuantizeMatMul") == len(plan.record.int8)
    assert "MatMulInteger" not in nodes


def test_what_loses_too_much_stays_dense(planned, tmp_path, monkeypatch):
    config, _, plan = planned()
    errors = sorted(plan.record.int8.values())
    monkeypatch.setattr(calibrate, "LIMIT", errors[3])
    config, checkpoint, plan = planned()
    assert sorted(plan.record.int8.values()) == errors[:4]
    assert sorted(plan.record.dense.values()) == errors[4:]
    assert {group.product for group in plan.smoothing} <= set(plan.record.int8)
    emit_vision(config, plan.view(checkpoint), tmp_path / "v.onnx", products=plan.products("onnxruntime"))
    operators = [node.op_type for node in onnx.load(tmp_path / "v.onnx", load_external_data=False).graph.node]
    assert operators.count("MatMulInteger") == 4


def test_of_a_product_whose_lengths_are_used_only_their_error_counts():
    x, weight = RNG.standard_normal((64, 32)).astype(np.float32), RNG.standard_normal((32, 64))
    weight[:, 0] *= 100  # in every row by far the longest part, and rounded well

    def error(length_only):
        product = Product(
            "p", 32, 64, ir.DataType.FLOAT, lambda: weight, lambda: np.full(64, 9.0), length_only
        )
        seen = calibrate.Seen(x.min(0), x.max(0), x)
        return calibrate.least_error(seen, product, False)[0]

    rounded = rounded_product(x, x.min(0), x.max(0), weight)
    assert error(False) == pytest.approx(relative_error(rounded, x @ weight))
    lengths = [np.linalg.norm(rows + 9, axis=1) for rows in (rounded, x @ weight)]
    assert error(True) == pytest.approx(relative_error(*lengths))
    assert 0 < error(True) < error(False)


def test_half_precision_is_refused():
    with pytest.raises(
        UhdError, match=r"vision_weights int8: ONNX Runtime rounds float32 .*leave --dtype out"
    ):
        BuildOptions(vision_weights="int8", dtype="float16")
