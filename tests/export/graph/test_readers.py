"""Both graphs as other readers of ONNX take them: the checker, and those without local functions."""

import importlib.metadata

import numpy as np
import onnx
import onnxruntime as ort
import openvino
import pytest
from golden import recipe
from support.tiny_language import CONTEXT, MODELS, difference, embeddings, reader, reference, tiny_model

from uhd_export.checkpoint.config import read_config
from uhd_export.checkpoint.options import SourceOptions
from uhd_export.checkpoint.reader import Checkpoint
from uhd_export.graph.inline import inline_functions
from uhd_export.graph.language import emit_language
from uhd_export.graph.vision import emit_vision
from uhd_export.runtime.image.geometry import crop_geometry


@pytest.fixture(scope="module")
def config(golden_checkpoint):
    return read_config(golden_checkpoint, SourceOptions(vision_tower=golden_checkpoint / "clip"))


def emit(config, golden_checkpoint, path, **options):
    checkpoint = Checkpoint(golden_checkpoint)
    emit_vision(config, checkpoint, path, **options)
    checkpoint.close()
    return path


def checked(path):
    """The model at `path`, which the checker takes with shapes inferred, and what it says of itself."""
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path, load_external_data=False)
    assert (model.producer_name, model.producer_version) == (
        "uhd-export",
        importlib.metadata.version("uhd-export"),
    )
    return model, {entry.key: entry.value for entry in model.metadata_props}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("fold", [True, False])
def test_the_vision_graph_passes_the_checker(config, golden_checkpoint, tmp_path, fold, dtype):
    path = emit(config, golden_checkpoint, tmp_path / "vision.onnx", fold=fold, dtype=dtype)
    _, metadata = checked(path)
    assert metadata == {
        **{"dtype": dtype, "projector": "hiwin", "pyramid": "jbu", "levels": "1,2,4"},
        "folded": str(fold).lower(),
    }


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("dialect", ["onnxruntime", "tensorrt"])
def test_the_language_graph_passes_the_checker(tmp_path, dialect, dtype):
    model = tiny_model(*MODELS[1])
    path = emit_language(
        model.config, reader(model), tmp_path / "language.onnx", dtype=dtype, dialect=dialect, context=64
    )
    _, metadata = checked(path)
    assert metadata == {"dtype": dtype, "dialect": dialect, "decoder": "qwen2", "context": "64"}


@pytest.fixture(scope="module")
def both(config, golden_checkpoint, tmp_path_factory):
    """The vision graph with functions and inline, inputs, and the tokens of the first."""
    folder = tmp_path_factory.mktemp("inline")
    whole = emit(config, golden_checkpoint, folder / "whole.onnx")
    inlined = emit(config, golden_checkpoint, folder / "inline.onnx")
    inline_functions(inlined)
    geometry = crop_geometry(19, 29, levels=config.projector.levels, side=12, table=24)
    inputs = {"pixels": recipe.normal(3, (2, 3, 19 * 14, 29 * 14)), **geometry}
    return whole, inlined, inputs, ort.InferenceSession(whole).run(None, inputs)[0]


def test_inlined_functions_compute_the_same(both):
    whole, inlined, inputs, expected = both
    assert onnx.load(whole, load_external_data=False).functions
    model, _ = checked(inlined)
    assert not model.functions and {entry.domain for entry in model.opset_import} == {""}
    actual = ort.InferenceSession(inlined).run(None, inputs)[0]
    assert np.abs(actual - expected).max() < 1e-5


def test_openvino_reads_the_inlined_graph(both):
    _, inlined, inputs, expected = both
    compiled = openvino.Core().compile_model(inlined, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    actual = compiled(inputs)[0]
    assert np.linalg.norm(actual - expected) < 1e-4 * np.linalg.norm(expected)


def test_openvino_runs_the_language_graph(tmp_path):
    model, embeds = tiny_model(*MODELS[1]), embeddings(40)
    path = emit_language(model.config, reader(model), tmp_path / "language.onnx")
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    cache = np.zeros((1, model.config.kv_heads, CONTEXT, model.config.head_size), np.float32)
    feeds = {
        name: cache for i in range(2) for name in (f"past_key_values.{i}.key", f"past_key_values.{i}.value")
    }
    feeds |= {"inputs_embeds": embeds, "seqlens_k": np.array([39], np.int32)}
    logits = compiled(feeds | {"total_sequence_length": np.array(40, np.int32)})["logits"]
    assert difference(logits[0, 0], reference(model, embeds)[-1]) < 1e-4
