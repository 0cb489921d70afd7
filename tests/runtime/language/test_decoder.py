"""Decoding on ONNX Runtime: equal to PyTorch however the positions arrive, and within its context."""

import numpy as np
import pytest
import torch
from golden import recipe
from support.goldens import assert_close, golden_tensors
from support.tiny_language import CONTEXT, MODELS, difference, embeddings, reader, reference, tiny_model

from uhd_export.checkpoint.reader import Checkpoint
from uhd_export.graph.language import emit_language
from uhd_export.runtime.engines.backends import open_engine
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.language.decoder import Decoder
from uhd_export.runtime.language.sampling import greedy

TOLERANCE = {"float32": 5e-6, "float16": 4e-3}
VARIANTS = [
    (case, dtype, dialect)
    for case in MODELS
    for dtype in TOLERANCE
    for dialect in ("onnxruntime", "tensorrt")
]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """`engine(case, dtype, dialect)`, opened once."""
    folder, opened = tmp_path_factory.mktemp("engines"), {}

    def get(case, dtype="float32", dialect="onnxruntime"):
        key = (case, dtype, dialect)
        if key not in opened:
            model = tiny_model(*case)
            path = folder / f"{len(opened)}.onnx"
            emit_language(model.config, reader(model), path, dtype=dtype, dialect=dialect)
            opened[key] = open_engine(path, threads=1)
        return opened[key]

    yield get
    for one in opened.values():
        one.close()


@pytest.mark.parametrize(("case", "dtype", "dialect"), VARIANTS)
def test_prefill_steps_rewind_and_chunks_equal_pytorch(engine, case, dtype, dialect):
    embeds = embeddings(60)
    expected = reference(tiny_model(*case), embeds)
    decoder = Decoder(engine(case, dtype, dialect), CONTEXT)
    assert difference(decoder.prefill(embeds[:, :40]), expected[39]) < TOLERANCE[dtype]
    for i in range(40, 50):
        logits = decoder.step(embeds[0, i])
        assert logits.dtype == np.float32
        assert difference(logits, expected[i]) < TOLERANCE[dtype]
        assert decoder.length == i + 1
    decoder.rewind(25)  # a second question: a longer turn after what both share
    assert difference(decoder.prefill(embeds[0, 25:60]), expected[59]) < TOLERANCE[dtype]
    decoder.rewind(0)
    assert difference(decoder.prefill(embeds, chunk=7), expected[59]) < TOLERANCE[dtype]
    assert decoder.length == 60


@pytest.mark.parametrize("dialect", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("case", MODELS)
def test_sixteen_greedy_tokens_equal_pytorch(engine, case, dialect):
    model = tiny_model(*case)
    table = model.model.embed_tokens.weight.numpy()
    sequence, expected = embeddings(20, seed=1), []
    for _ in range(16):
        expected.append(greedy(reference(model, sequence)[-1]))
        sequence = np.concatenate([sequence, table[expected[-1]][None, None]], 1)
    decoder = Decoder(engine(case, dialect=dialect), CONTEXT)
    tokens = [greedy(decoder.prefill(embeddings(20, seed=1)))]
    while len(tokens) < 16:
        tokens.append(greedy(decoder.step(table[tokens[-1]])))
    assert tokens == expected
    decoder.rewind(0)
    tokens = [decoder.greedy(embeddings(20, seed=1), chunk=7)]  # chosen by the engine
    while len(tokens) < 16:
        tokens.append(decoder.greedy(table[tokens[-1]][None]))
    assert tokens == expected
    assert len(set(tokens)) > 3  # a constant answer would prove little


@pytest.mark.parametrize("dialect", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_engine_takes_the_first_of_equal_logits_and_tells_of_what_is_no_number(tmp_path, dialect, dtype):
    model = tiny_model(*MODELS[0])
    head = model.lm_head.weight.clone()
    embeds = embeddings(4)
    best = greedy(reference(model, embeds)[-1])

    def chosen(change):
        rows = head.clone()
        change(rows)
        tensors = reader(model)
        read = lambda name: rows if name == "lm_head.weight" else tensors(name)  # noqa: E731
        emit_language(model.config, read, tmp_path / "l.onnx", dtype=dtype, dialect=dialect)
        with open_engine(tmp_path / "l.onnx", threads=1) as engine:
            decoder = Decoder(engine, CONTEXT)
            token = decoder.greedy(embeds)
            decoder.rewind(0)
            assert token == greedy(decoder.prefill(embeds))
            return token

    def equal(rows):
        for token in (17, 203, 299):
            rows[token] = head[best]

    assert chosen(lambda rows: None) == best
    assert chosen(equal) == min(best, 17)
    # In float16 the CPU's product is float32, which nothing in a float16 file makes overflow.
    for value in (3e38, -3e38) if dtype == "float32" else ():
        with pytest.raises(UhdError, match="its logits are not finite numbers"):
            chosen(lambda rows: rows[5].copy_(value * head[best].sign()))  # noqa: B023


@pytest.mark.slow
def test_the_released_models_logits_and_tokens(golden_model, golden_checkpoint, tmp_path):
    model, golden = golden_model(layout="flat"), golden_tensors("model_flat")
    path = emit_language(
        model.config.language, Checkpoint(golden_checkpoint), tmp_path / "l.onnx", context=1200
    )
    table = model.language.model.embed_tokens.weight.numpy()
    with open_engine(path) as engine:
        decoder = Decoder(engine, 1200)
        for case, size in {"main": (1008, 672, 0), "noslice": (500, 120, 5)}.items():
            with torch.inference_mode():
                prompt = golden[f"{case}/prompt"].tolist()
                embeds = model.inputs_embeds(recipe.image(*size), prompt).numpy()
            decoder.rewind(0)
            logits = decoder.prefill(embeds)
            assert_close(logits[::1000], golden[f"{case}/logits_every1000"][-1])
            tokens = [greedy(logits)]
            while len(tokens) < 16:
                tokens.append(greedy(decoder.step(table[tokens[-1]])))
            assert tokens == golden[f"{case}/generated"].tolist()


def test_two_decoders_share_an_engine_and_not_their_caches(engine):
    embeds, other = embeddings(30), embeddings(30, seed=3)
    model = tiny_model(*MODELS[1])
    first, second = (Decoder(engine(MODELS[1]), CONTEXT) for _ in range(2))
    first.prefill(embeds[:, :29])
    second.prefill(other[:, :29])
    assert difference(first.step(embeds[:, 29]), reference(model, embeds)[-1]) < TOLERANCE["float32"]
    assert difference(second.step(other[:, 29]), reference(model, other)[-1]) < TOLERANCE["float32"]


def test_logits_survive_the_next_step(engine):
    decoder = Decoder(engine(MODELS[0]), CONTEXT)
    logits = decoder.prefill(embeddings(3))
    kept = logits.copy()
    decoder.step(embeddings(1)[0])
    assert np.array_equal(logits, kept)


def test_the_cache_is_counted_once_and_reset_is_not_needed(engine):
    decoder = Decoder(engine(MODELS[1], "float16"), 80)
    assert (
        decoder.kv_bytes == 2 * 2 * 2 * 80 * 32 * 2
    )  # layers, key and value, kv heads, positions, size, bytes
    assert decoder.remaining == 80


def test_the_context_is_never_exceeded(engine):
    decoder, model = Decoder(engine(MODELS[0]), 32), tiny_model(*MODELS[0])
    embeds = embeddings(40)
    with pytest.raises(UhdError, match=r"context: 40 positions .* \(0 cached, 40 new\), but it holds 32"):
        decoder.prefill(embeds, chunk=8)
    assert decoder.length == 0
    decoder.prefill(embeds[:, :31])
    with pytest.raises(UhdError, match=r"\(31 cached, 2 new\)"):
        decoder.prefill(embeds[:, :2])
    # The refused calls have left the cache as it was, and the last free position can be used.
    assert difference(decoder.step(embeds[0, 31]), reference(model, embeds)[31]) < TOLERANCE["float32"]
    with pytest.raises(UhdError, match="context: 33 positions"):
        decoder.step(embeds[0, 32])
    assert decoder.remaining == 0


def test_a_fixed_capacity_is_known_and_kept(engine):
    fixed = engine(MODELS[0], dialect="tensorrt")
    assert Decoder(fixed).context == CONTEXT
    assert Decoder(fixed, 10).context == 10
    with pytest.raises(UhdError, match=f"context: 1000 positions, but the engine was built for {CONTEXT}"):
        Decoder(fixed, 1000)
    with pytest.raises(UhdError, match="context: the engine has no fixed one"):
        Decoder(engine(MODELS[0]))


def test_wrong_lengths_and_shapes_are_refused(engine):
    decoder = Decoder(engine(MODELS[0]), CONTEXT)
    decoder.prefill(embeddings(4))
    for length in (-1, 5):
        with pytest.raises(UhdError, match=f"rewind to {length}: the cache holds 4"):
            decoder.rewind(length)
    with pytest.raises(UhdError, match="prefill chunk: 0"):
        decoder.prefill(embeddings(4), chunk=0)
    for wrong in (np.zeros((1, 0, 128)), np.zeros((2, 3, 128)), np.zeros((3, 64))):
        with pytest.raises(ValueError, match="embeddings of shape"):
            decoder.prefill(wrong.astype(np.float32))
