"""How ONNX Runtime attends over a cache of 8 bits is said by the environment while a session is made."""

import os

import numpy as np
import onnxruntime
import pytest
from support.tiny_language import CONTEXT, MODELS, embeddings, reader, tiny_model

from uhd_export.graph.cache import FloatCache, Int8Cache, LayerScales
from uhd_export.graph.language import emit_language
from uhd_export.runtime.engines.backends import open_engine
from uhd_export.runtime.language.decoder import Decoder

SWITCH = "ORT_GQA_DISABLE_FLASH_ATTENTION"


@pytest.fixture
def seen(monkeypatch):
    """What the variable was in each session that was made."""
    monkeypatch.delenv(SWITCH, raising=False)
    made, values = onnxruntime.InferenceSession, []

    def session(*args, **options):
        values.append(os.environ.get(SWITCH))
        return made(*args, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    return values


@pytest.fixture(params=["float32", "int8"])
def graph(request, tmp_path):
    model = tiny_model(*MODELS[0])
    scales = np.full((model.config.kv_heads, model.config.head_size), 0.1, np.float32)
    cache = FloatCache("float32")
    if request.param == "int8":
        cache = Int8Cache([LayerScales(scales, scales)] * model.config.layers)
    return request.param, emit_language(model.config, reader(model), tmp_path / "l.onnx", cache=cache)


def test_only_a_cache_of_integers_is_attended_at_once(graph, seen):
    kind, path = graph
    with open_engine(path, threads=1):
        assert seen[-1] == ("1" if kind == "int8" else None)
        assert SWITCH not in os.environ


def test_what_the_user_chose_stands(graph, seen, monkeypatch):
    monkeypatch.setenv(SWITCH, "0")
    with open_engine(graph[1], threads=1):
        assert seen[-1] == os.environ[SWITCH] == "0"


def test_both_ways_compute_the_same(graph, monkeypatch):
    embeds, logits = embeddings(40), []
    for chosen in ("0", "1"):
        monkeypatch.setenv(SWITCH, chosen)
        with open_engine(graph[1], threads=1) as engine:
            decoder = Decoder(engine, CONTEXT)
            decoder.prefill(embeds)
            logits.append(decoder.step(embeds[0, 0]))
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-4)
