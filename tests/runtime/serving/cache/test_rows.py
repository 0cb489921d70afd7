"""Rows of one cache: an answer among others equals the answer alone."""

import numpy as np
import pytest
from support.tiny_language import CONTEXT, MODELS, difference, embeddings, reader, reference, tiny_model

from uhd_export.graph.language import emit_language
from uhd_export.runtime.engines.backends import open_engine
from uhd_export.runtime.engines.base import Binding, Stop, Stopped
from uhd_export.runtime.engines.onnxruntime import OrtBinding
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.serving.cache.rows import Rows


@pytest.fixture(params=[(case, dialect) for case in MODELS for dialect in ("onnxruntime", "tensorrt")])
def language(request, tmp_path):
    """An engine and its model. Of the tensorrt dialect, whose graph takes one sequence at a time, too."""
    case, dialect = request.param
    model = tiny_model(*case)
    path = emit_language(model.config, reader(model), tmp_path / "l.onnx", dialect=dialect)
    with open_engine(path, threads=1) as engine:
        yield engine, model


def test_rows_of_different_lengths_equal_pytorch_each(language):
    engine, model = language
    rows = Rows(engine, 4, CONTEXT)
    inputs = [embeddings(60, seed)[0] for seed in range(4)]
    expected = [reference(model, one[None]) for one in inputs]
    lengths = [40, 7, 23, 1]
    for row in (0, 2):
        logits = rows.append(row, inputs[row][: lengths[row]])
        assert difference(logits, expected[row][lengths[row] - 1]) < 5e-6

    def step(chosen):
        logits = rows.step(chosen, np.stack([inputs[row][lengths[row]] for row in chosen]))
        for row, one in zip(chosen, logits, strict=True):
            assert difference(one, expected[row][lengths[row]]) < 5e-6
            lengths[row] += 1

    step([0, 2])  # row 1 lies between them and is empty
    rows.append(1, inputs[1][:3])  # a newcomer in two chunks, and a step of others between them
    step([2, 0])
    logits = rows.append(1, inputs[1][3:7])
    assert difference(logits, expected[1][6]) < 5e-6
    rows.append(3, inputs[3][:1])
    for chosen in ([0, 1, 2, 3], [3, 0], [0, 3], [1], [3, 2, 1, 0]):
        step(chosen)
    for row in range(4):  # the same by the engine's own choice, where that is all that is wanted
        rows.rewind(row, lengths[row] - 1)
    best = rows.step_greedy([3, 1], np.stack([inputs[row][lengths[row] - 1] for row in (3, 1)]))
    assert [one.checked() for one in best] == [expected[row][lengths[row] - 1].argmax() for row in (3, 1)]
    (rows.rewind(0, 5), rows.rewind(2, 10))
    assert rows.append_greedy(0, inputs[0][5 : lengths[0]]).checked() == expected[0][lengths[0] - 1].argmax()
    logits = rows.append(2, inputs[2][10:50])
    assert difference(logits, expected[2][49]) < 5e-6
    assert rows.lengths == [lengths[0], lengths[1], 50, lengths[3]]


def test_one_cache_is_reserved_for_all_rows(language):
    engine, model = language
    config = model.config
    one = 2 * config.layers * config.kv_heads * CONTEXT * config.head_size * 4
    assert Rows(engine, 3, CONTEXT).nbytes == 3 * one
    assert Rows(engine, 3, CONTEXT).together == (engine.inputs["inputs_embeds"].shape[0] == "rows")


def test_a_full_row_is_refused_and_a_stopped_run_changes_nothing(language):
    engine, _ = language
    rows = Rows(engine, 2, CONTEXT)
    embeds = embeddings(CONTEXT + 1)[0]
    stop = Stop()
    stop.request()
    if rows.together:
        with pytest.raises(Stopped):
            rows.append(0, embeds[:10], stop)
        assert rows.lengths == [0, 0]
    rows.append(0, embeds[:CONTEXT])
    rows.append(1, embeds[:4])
    with pytest.raises(UhdError, match="context"):
        rows.step([0, 1], embeds[:2])
    with pytest.raises(UhdError, match=f"context: {CONTEXT + 1} positions are needed"):
        rows.append(0, embeds[:1])
    if rows.together:
        assert rows.lengths == [CONTEXT, 4]


def test_a_backend_without_rows_takes_one_slot_and_refuses_more_at_once(language, monkeypatch):
    engine, model = language
    monkeypatch.setattr(OrtBinding, "rows", Binding.rows)
    one, inputs = Rows(engine, 1, CONTEXT), embeddings(9)[0]
    one.append(0, inputs[:8])
    assert difference(one.step([0], inputs[8:9])[0], reference(model, inputs[None])[8]) < 5e-6
    if one.together:
        with pytest.raises(UhdError, match=r"^slots: OrtBinding keeps one sequence; use --slots 1$"):
            Rows(engine, 2, CONTEXT)
    else:  # each slot has a cache of its own
        assert Rows(engine, 2, CONTEXT).count == 2
