"""vision.onnx in stock ONNX Runtime equals PyTorch: folded and not, at any crop shape and grid mode."""

import functools
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.goldens import GOLDEN

from uhd_export.checkpoint.reader import Checkpoint
from uhd_export.graph.vision import emit_vision
from uhd_export.plugins.graph import PLUGIN_DOMAIN
from uhd_export.runtime.image.geometry import crop_geometry

RELATIVE = 1e-3


@pytest.fixture(scope="module")
def vision_session(golden_model, golden_checkpoint, tmp_path_factory):
    """`vision_session(fold, dtype, **model options)`: (model, ONNX Runtime session), emitted once."""

    @functools.cache
    def build(fold=True, dtype="float32", contrib=False, **options):
        model = golden_model(**options)
        path = tmp_path_factory.mktemp("vision") / "vision.onnx"
        checkpoint = Checkpoint(golden_checkpoint)
        emit_vision(model.config, checkpoint, path, fold=fold, dtype=dtype, contrib=contrib)
        checkpoint.close()
        quiet = ort.SessionOptions()
        quiet.log_severity_level = 3
        return model, ort.InferenceSession(path, quiet)

    return build


def errors(model, session, rows, cols, *, grid_mode="selective", batch=1, seed=0):
    pixels = torch.randn(batch, 3, rows * 14, cols * 14, generator=torch.Generator().manual_seed(seed))
    model.images, before = replace(model.images, grid_mode=grid_mode), model.images
    try:
        expected = model.encode_crops(pixels).numpy()
        geometry = model.geometry(rows, cols)
    finally:
        model.images = before
    feeds = {i.name: geometry[i.name].numpy() for i in session.get_inputs() if i.name != "pixels"}
    actual = session.run(["tokens"], {"pixels": pixels.numpy(), **feeds})[0]
    assert actual.shape == expected.shape
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("mask", [1, 3, 5, 7])
def test_graph_equals_pytorch(vision_session, fold, mask):
    assert errors(*vision_session(fold, mask=mask), 5, 7, batch=2) < RELATIVE


def test_onnx_runtimes_own_attention_equals_pytorch(vision_session):
    model, session = vision_session(contrib=True)
    assert errors(model, session, 24, 24, batch=2) < RELATIVE
    assert errors(model, session, 5, 7) < RELATIVE
    nodes = onnx.load(session._model_path, load_external_data=False).graph.node
    attention = [node.name for node in nodes if node.op_type == "MultiHeadAttention"]
    assert len(attention) == model.config.vision.layers
    assert all(name.startswith("vit/") for name in attention)


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("grid_mode", ["selective", "fix", "pyramid"])
def test_grid_modes_are_chosen_by_the_geometry_fed(vision_session, fold, grid_mode):
    assert errors(*vision_session(fold), 6, 4, grid_mode=grid_mode) < RELATIVE


@pytest.mark.parametrize("fold", [True, False])
def test_v1_projector(vision_session, fold):
    assert errors(*vision_session(fold, config=GOLDEN / "configs" / "v1.json"), 19, 29) < RELATIVE


def test_square_crops_and_overview_at_full_size(vision_session):
    model, session = vision_session()
    assert errors(model, session, 24, 24, batch=2) < RELATIVE
    assert errors(model, session, 19, 29) < RELATIVE


@settings(max_examples=12)
@given(rows=st.integers(2, 12), cols=st.integers(2, 12), seed=st.integers(0, 99), fold=st.booleans())
def test_any_crop_shape(vision_session, rows, cols, seed, fold):
    assert errors(*vision_session(fold), rows, cols, seed=seed) < RELATIVE


def test_bf16_boxes_are_geometry(vision_session):
    """The rounded boxes of bf16 runs need no other file, only other matrices."""
    _, session = vision_session()
    names = {i.name for i in session.get_inputs()}
    pixels = np.random.default_rng(0).standard_normal((1, 3, 41 * 14, 13 * 14), np.float32)
    runs = []
    for roi_rounding in ("exact", "bf16"):
        geometry = {k: v for k, v in crop_geometry(41, 13, roi_rounding=roi_rounding).items() if k in names}
        runs.append(session.run(["tokens"], {"pixels": pixels, **geometry})[0])
    assert np.abs(runs[0] - runs[1]).max() > 1e-3


@pytest.mark.parametrize("fold", [True, False])
def test_half_precision(vision_session, fold):
    assert errors(*vision_session(fold, dtype="float16"), 5, 7) < 5e-3


def test_custom_ops_are_nodes_with_bodies(vision_session):
    _, session = vision_session(True)
    model = onnx.load(session._model_path, load_external_data=False)
    nodes = [node.op_type for node in model.graph.node if node.domain == PLUGIN_DOMAIN]
    assert nodes == ["JBU", "JBU", "WindowAttention"]
    assert {f.name for f in model.functions if f.domain == PLUGIN_DOMAIN} == {"JBU", "WindowAttention"}
    onnx.checker.check_model(session._model_path)


def test_node_names_tell_the_stage(vision_session):
    _, session = vision_session(True)
    model = onnx.load(session._model_path, load_external_data=False)
    stages = {node.name.split("/")[0] for node in model.graph.node if "/" in node.name}
    assert stages == {"vit", "jbu", "hiwin"}
    assert sum("/" not in node.name for node in model.graph.node) == 1  # the output's name
