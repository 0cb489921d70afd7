"""What TensorRT's parser makes of our graphs computes what ONNX Runtime does, profile by profile."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.tensorrt_interpreter import Interpreter
from support.tiny_language import CONTEXT, MODELS, difference, embeddings, reader, reference, tiny_model

from uhd_export.checkpoint.reader import Checkpoint
from uhd_export.graph.int4.formats import Int4Dequantize, RoundedWeights
from uhd_export.graph.language import emit_language
from uhd_export.graph.vision import emit_vision
from uhd_export.plugins.graph import GraphBuilder
from uhd_export.plugins.jbu import torch_op as jbu
from uhd_export.plugins.tensorrt.plugin import register
from uhd_export.plugins.window_attention import torch_op as window
from uhd_export.runtime.engines.backends import open_engine
from uhd_export.runtime.engines.tensorrt import backend as tensorrt_backend
from uhd_export.runtime.image.geometry import crop_geometry
from uhd_export.runtime.language import decoder as decoders
from uhd_export.runtime.language.decoder import Decoder
from uhd_export.tensorrt import language_profiles, vision_profiles
from uhd_export.tensorrt.network import load_graph, parse

trt = pytest.importorskip("tensorrt_rtx")


def parsed(path, profiles, plugins=()):
    builder = trt.Builder(tensorrt_backend.logger(trt))
    return parse(trt, builder, load_graph(path, plugins), path, profiles)


PLUGINS = {
    "JBU": lambda inputs: jbu.reference(*inputs),
    "WindowAttention": lambda inputs: window.reference_output(*inputs[:3], inputs[3:]),
}


@pytest.mark.slow
@pytest.mark.parametrize(("fold", "plugins"), [(True, True), (True, False), (False, False)])
def test_vision(golden_model, golden_checkpoint, tmp_path, fold, plugins):
    config = golden_model(mask=3).config
    checkpoint = Checkpoint(golden_checkpoint)
    emit_vision(config, checkpoint, tmp_path / "vision.onnx", fold=fold)
    checkpoint.close()
    operators = register(trt, ("8.9",)) if plugins else ()
    network = parsed(tmp_path / "vision.onnx", vision_profiles(config), operators)
    assert len(network.plugin_layers()) == (2 if plugins else 0)
    interpreter = Interpreter(trt, network.network, plugins=PLUGINS)
    with open_engine(tmp_path / "vision.onnx", threads=1) as host:
        for rows, cols, batch, grid_mode in [
            (5, 7, 2, "selective"),
            (24, 24, 1, "fix"),
            (6, 4, 1, "pyramid"),
        ]:
            geometry = crop_geometry(rows, cols, levels=(1, 2), grid_mode=grid_mode)
            pixels = np.random.default_rng(0).standard_normal((batch, 3, rows * 14, cols * 14), np.float32)
            feeds = {"pixels": pixels, **{n: geometry[n] for n in host.inputs if n != "pixels"}}
            assert difference(interpreter.run(feeds)["tokens"], host.infer(feeds)["tokens"]) < 1e-5


def int4_weights(path):
    """The INT4 initializers as integers, which TensorRT's binding does not show."""
    model = onnx.load(path)
    packed = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT4]
    return {tensor.name: onnx.numpy_helper.to_array(tensor).astype(np.int8) for tensor in packed}


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("int4", [False, True])
def test_language(tmp_path, case, int4, monkeypatch):
    monkeypatch.setattr(decoders, "_LEAST_VISIBLE", 8)
    model, path = tiny_model(*case), tmp_path / "l.onnx"
    linear = Int4Dequantize(RoundedWeights(32)) if int4 else None
    emit_language(model.config, reader(model), path, dialect="tensorrt", linear=linear)
    network = parsed(path, language_profiles(model.config, CONTEXT))
    interpreter = Interpreter(trt, network.network, int4_weights(path))
    embeds = embeddings(12)
    if int4:
        with open_engine(path, threads=1) as host:
            decoder = Decoder(host, CONTEXT)
            expected = np.stack([decoder.step(row) for row in embeds[0]])
    else:
        expected = reference(model, embeds)
    cache = {n: np.zeros(i.info.shape, np.float32) for n, i in network.inputs.items() if n.startswith("past")}
    for start, stop in ((0, 8), (8, 9), (9, 10), (10, 12)):
        index = np.array([start], np.int64)
        seen = decoders.visible(stop, CONTEXT)
        assert len(seen) == (8 if stop == 8 else 16)
        feeds = {"inputs_embeds": embeds[:, start:stop], "write_index": index, "visible": seen}
        out = interpreter.run(feeds | cache)
        assert difference(out["logits"][0, 0], expected[stop - 1]) < 1e-5
        assert out["token"].tolist() == [[out["logits"].argmax()]]
        assert out["logits_sum"][0, 0] == pytest.approx(out["logits"].sum(), abs=1e-3)
        cache = {past: out[present] for present, past in network.aliases.items()}


def test_it_shows_what_the_parser_passes_over(tmp_path):
    """Attention takes nonpad_kv_seqlen and ignores it (TensorRT-RTX 1.7): why our graphs have a mask."""
    shape = (1, 2, 4, 32)
    b = GraphBuilder("attention", opset=24)
    q, k, v = (b.input(name, ir.DataType.FLOAT, shape) for name in "qkv")
    lengths = b.input("lengths", ir.DataType.INT64, (1,))
    out = b.op("Attention", q, k, v, None, None, None, lengths, name="attention")
    b.output(out, "out", ir.DataType.FLOAT, shape)
    b.save(tmp_path / "a.onnx")
    random = np.random.default_rng(0)
    feeds = {name: random.standard_normal(shape, np.float32) for name in "qkv"}
    interpreter = Interpreter(trt, parsed(tmp_path / "a.onnx", []).network)
    with open_engine(tmp_path / "a.onnx", threads=1) as host:
        for length, ignored in ((4, False), (2, True)):
            feeds["lengths"] = np.array([length], np.int64)
            error = difference(interpreter.run(feeds)["out"], host.infer(feeds)["out"])
            assert (error > 0.1) == ignored
