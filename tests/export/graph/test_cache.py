"""A cache in another type than the activations, and in 8 bits: what attends in float, and what is kept."""

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from support.contrib_ops import CONTRIB_OPS
from support.tiny_language import CONTEXT, MODELS, difference, embeddings, reader, reference, tiny_model

from uhd_export.graph.cache import FloatCache, Int8Cache, LayerScales, rounded, scales_for
from uhd_export.graph.float_cache import float_cache_engine
from uhd_export.graph.grouped_attention import LONG_RUN
from uhd_export.graph.language import emit_language
from uhd_export.runtime.engines.backends import open_engine
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.language.decoder import PAST, SEQUENCE_LENGTHS, TOTAL_LENGTH, WRITE_INDEX, Decoder
from uhd_export.runtime.serving.cache.rows import Rows

# Of logits, relative, by the type of the cache.
TOLERANCE = {"float32": 5e-6, "float16": 2e-3, "int8": 2e-2}
LENGTH = 2 * LONG_RUN + 8


def cached(model, embeds):
    """What PyTorch caches of (1, S, D), (kv_heads, S, size) each: keys and values by layer."""
    cache = model.new_cache()
    model(torch.from_numpy(embeds), cache)
    return [[part[0].numpy() for part in layer] for layer in cache]


def int8(model):
    """Scales at which what the tests embed fits."""
    layers = [cached(model, embeddings(LENGTH, seed)) for seed in range(3)]
    largest = [np.max([[abs(part).max(1) for part in one[i]] for one in layers], 0) for i in range(2)]
    return Int8Cache([LayerScales(*map(scales_for, pair)) for pair in largest])


def emitted(model, path, cache, dtype="float32"):
    form = int8(model) if cache == "int8" else FloatCache(cache)
    return emit_language(model.config, reader(model), path, dtype=dtype, cache=form)


@pytest.fixture(params=MODELS, ids=["full", "grouped", "one head"])
def model(request):
    return tiny_model(*request.param)


@pytest.fixture(params=TOLERANCE)
def language(request, model, tmp_path):
    """An engine of each cache, its tolerance, and the model."""
    with open_engine(emitted(model, tmp_path / "l.onnx", request.param), threads=1) as engine:
        yield engine, request.param, model


def test_prompts_steps_and_further_turns_equal_pytorch(language):
    engine, cache, model = language
    embeds = embeddings(LENGTH)
    expected = reference(model, embeds)
    decoder = Decoder(engine, CONTEXT)
    size = model.config
    values = 2 * size.layers * size.kv_heads * CONTEXT * size.head_size
    assert decoder.kv_bytes == values * np.dtype(cache).itemsize
    # What a prompt says does not come from the cache: it costs nothing.
    first = difference(decoder.prefill(embeds[:, :40]), expected[39])
    assert first < TOLERANCE["float32" if cache == "int8" else cache]
    for i in range(40, 44):
        assert difference(decoder.step(embeds[0, i]), expected[i]) < TOLERANCE[cache]
    decoder.rewind(20)  # a further turn, short and long, after what is cached
    assert difference(decoder.prefill(embeds[:, 20:30]), expected[29]) < TOLERANCE[cache]
    assert difference(decoder.prefill(embeds[:, 30:LENGTH]), expected[-1]) < TOLERANCE[cache]
    decoder.rewind(0)
    for chunk in (7, LONG_RUN + 1):
        assert difference(decoder.prefill(embeds, chunk=chunk), expected[-1]) < TOLERANCE[cache]
        decoder.rewind(0)


def test_rows_of_different_lengths_are_decoded_together(language):
    engine, cache, model = language
    inputs = [embeddings(LENGTH, seed)[0] for seed in range(3)]
    expected = [reference(model, one[None]) for one in inputs]
    rows, lengths = Rows(engine, 3, CONTEXT), [LONG_RUN + 8, 5, LONG_RUN]
    for row, length in enumerate(lengths):
        rows.append(row, inputs[row][:length])
    for chosen in ([0, 1, 2], [2, 0], [1]):
        logits = rows.step(chosen, np.stack([inputs[row][lengths[row]] for row in chosen]))
        for row, one in zip(chosen, logits, strict=True):
            assert difference(one, expected[row][lengths[row]]) < TOLERANCE[cache]
            lengths[row] += 1


def test_a_long_run_keeps_the_integers_that_a_short_one_keeps(model, tmp_path):
    embeds, form = embeddings(LENGTH), int8(model)
    with open_engine(emitted(model, tmp_path / "l.onnx", "int8"), threads=1) as engine:
        long, short = Decoder(engine, CONTEXT), Decoder(engine, CONTEXT)
        long.prefill(embeds)
        short.prefill(embeds, chunk=1)
        for i, layer in enumerate(cached(model, embeds)):
            for part, array, scales in zip(
                ("key", "value"), layer, (form.scales[i].key, form.scales[i].value), strict=True
            ):
                kept = long._cache.read(PAST.format(i, part))[0]
                assert kept.dtype == np.int8 and not kept[:, LENGTH:].any()
                wide = kept[:, :LENGTH] * scales[:, None]
                # A value half way between two integers may go either way.
                assert (wide != rounded(array, scales[:, None])).mean() < 1e-3
                if i == 0:  # later layers have read what was rounded
                    other = short._cache.read(PAST.format(i, part))[0]
                    assert (kept != other).mean() < 1e-3


def test_onnx_reference_computes_the_same_without_a_backend(model, tmp_path):
    embeds = embeddings(LENGTH)
    expected = reference(model, embeds)
    session = ReferenceEvaluator(str(emitted(model, tmp_path / "l.onnx", "int8")), new_ops=CONTRIB_OPS)
    config = model.config
    cache = {
        PAST.format(i, part): np.zeros((1, config.kv_heads, CONTEXT, config.head_size), np.int8)
        for i in range(config.layers)
        for part in ("key", "value")
    }
    for start, stop in ((0, 40), (40, 41), (41, LENGTH), (20, 28)):
        feeds = {
            "inputs_embeds": embeds[:, start:stop],
            SEQUENCE_LENGTHS: np.array([stop - 1], np.int32),
            TOTAL_LENGTH: np.array(stop, np.int32),
            WRITE_INDEX: np.array([start]),
        }
        results = dict(zip(session.output_names, session.run(None, feeds | cache), strict=True))
        cache = {name: results[name.replace("past_key_values", "present")] for name in cache}
        assert difference(results["logits"][0, 0], expected[stop - 1]) < TOLERANCE["int8"]


def test_half_precision_activations_take_every_cache(tmp_path):
    model, embeds = tiny_model(*MODELS[1]), embeddings(LENGTH)
    expected = reference(model, embeds)
    for cache in TOLERANCE:
        with open_engine(emitted(model, tmp_path / "l.onnx", cache, "float16"), threads=1) as engine:
            decoder = Decoder(engine, CONTEXT)
            assert difference(decoder.prefill(embeds[:, :-1]), expected[-2]) < 4e-3
            assert difference(decoder.step(embeds[0, -1]), expected[-1]) < 4e-3 + TOLERANCE[cache]


def test_no_name_in_a_branch_hides_one_outside(tmp_path):
    graph = onnx.load(emitted(tiny_model(*MODELS[0]), tmp_path / "l.onnx", "int8")).graph
    outside = {name for node in graph.node for name in node.output} | {i.name for i in graph.input}
    branches = [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    inside = [name for branch in branches for node in branch.node for name in node.output]
    assert len(branches) == 4 and len(inside) == len(set(inside)) and not outside & set(inside)


def test_what_is_small_or_unseen_is_no_division_by_zero():
    scales = scales_for(np.array([0.0, 1e-9, 12.7]))
    assert np.isfinite(np.float16(1) / scales.astype(np.float16)).all()
    assert rounded(np.array([5.0, -20.0]), scales[2:]) == pytest.approx([5.0, -12.8])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": FloatCache("int4")}, "cache: 'int4' is not supported; use one of float32, float16"),
        ({"cache": FloatCache("float16"), "dialect": "tensorrt"}, "cache: the tensorrt dialect keeps it"),
    ],
)
def test_another_cache_is_refused(tmp_path, options, message):
    model = tiny_model(*MODELS[0])
    with pytest.raises(UhdError, match=message):
        emit_language(model.config, reader(model), tmp_path / "l.onnx", **options)
    assert not list(tmp_path.iterdir())


def test_scales_of_another_model_are_refused(tmp_path):
    model = tiny_model(*MODELS[0])
    wrong = int8(model).scales[0].key
    for scales, words in (
        (int8(model).scales[:1], "2 pairs"),
        ([LayerScales(wrong[:2], wrong)] * 2, "of shape"),
        ([LayerScales(wrong, wrong * 0)] * 2, "above zero"),
    ):
        with pytest.raises(ValueError, match=words):
            emit_language(model.config, reader(model), tmp_path / "l.onnx", cache=Int8Cache(scales))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_same_graph_with_a_float_cache_is_what_its_cache_is_measured_against(tmp_path, dtype):
    model, embeds = tiny_model(*MODELS[1]), embeddings(LENGTH)
    plain, expected = {}, None
    for cache in (dtype, "int8", "float16"):
        path = emitted(model, tmp_path / f"{cache}.onnx", cache, dtype)
        files = sorted(tmp_path.iterdir())
        with open_engine(path, threads=1) as engine, float_cache_engine(path, model.config) as other:
            logits = []
            for one in (engine, other):
                decoder = Decoder(one, CONTEXT)
                decoder.prefill(embeds[:, :-4])
                logits.append(np.stack([decoder.step(embeds[0, i]) for i in range(-4, 0)]))
        plain[cache] = difference(*logits)
        expected = logits[0] if expected is None else expected
        assert np.array_equal(logits[1], expected)
        assert sorted(tmp_path.iterdir()) == files
    assert plain[dtype] == 0 < plain["int8"] < TOLERANCE["int8"]
    assert (plain["float16"] > 0) == (dtype == "float32")
