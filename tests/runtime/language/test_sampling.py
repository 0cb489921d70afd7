"""Sampling: what is kept, in which proportions, and repeatably."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.language.sampling import greedy, penalised, probabilities, sample
from uhd_export.runtime.settings import Sampling

LOGITS = hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-50, 50, width=32))
TEMPERATURES = st.floats(0.05, 5)
TOP_K = st.integers(0, 50)
TOP_P = st.floats(0.01, 1)


@given(LOGITS, TEMPERATURES, TOP_K, TOP_P)
def test_probabilities_sum_to_one_and_keep_the_best(logits, temperature, top_k, top_p):
    p = probabilities(logits, Sampling(temperature, top_k, top_p))
    assert p.shape == logits.shape and p.dtype == np.float64
    assert p.sum() == pytest.approx(1) and (p >= 0).all()
    assert p[greedy(logits)] == p.max() > 0
    kept = p > 0
    if (~kept).any():
        dropped_with_weight = logits[~kept]
        assert logits[kept].min() >= dropped_with_weight.max()


@given(LOGITS, TEMPERATURES)
def test_without_filters_it_is_the_softmax(logits, temperature):
    wide = logits.astype(np.float64)
    expected = np.exp((wide - wide.max()) / temperature)
    np.testing.assert_allclose(
        probabilities(logits, Sampling(temperature)), expected / expected.sum(), atol=1e-9
    )


@given(LOGITS, st.integers(1, 50))
def test_top_k_keeps_exactly_k(logits, k):
    p = probabilities(logits, Sampling(10.0, top_k=k))
    assert np.count_nonzero(p) == min(k, logits.size)


@given(LOGITS, TEMPERATURES, TOP_P)
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits, temperature, top_p):
    full = probabilities(logits, Sampling(temperature))
    kept = probabilities(logits, Sampling(temperature, top_p=top_p)) > 0
    mass = full[kept].sum()
    assert mass >= top_p - 1e-9
    if kept.sum() > 1:
        assert mass - full[kept].min() < top_p + 1e-9


@given(LOGITS, TEMPERATURES, TOP_K, TOP_P, st.integers(0, 2**32))
def test_a_seed_repeats_and_the_token_is_a_kept_one(logits, temperature, top_k, top_p, seed):
    sampling = Sampling(temperature, top_k, top_p, seed)
    first, second = sampling.generator(), sampling.generator()
    tokens = [sample(logits, sampling, first) for _ in range(5)]
    assert tokens == [sample(logits, sampling, second) for _ in range(5)]
    assert (probabilities(logits, sampling)[tokens] > 0).all()


@given(LOGITS)
def test_greedy_needs_no_randomness(logits):
    generator = np.random.default_rng(0)
    before = generator.bit_generator.state
    assert sample(logits, Sampling(), generator) == greedy(logits) == int(logits.argmax())
    assert generator.bit_generator.state == before
    assert probabilities(logits, Sampling())[greedy(logits)] == 1


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.25, [0]),
        (0.5, [0, 1]),
        (0.75, [0, 1, 2]),
        (np.nextafter(0.5, 0), [0, 1]),
        (np.nextafter(0.5, 1), [0, 1, 2]),
    ],
)
def test_the_token_that_reaches_top_p_exactly_is_the_last(top_p, kept):
    """Four equal tokens: their sums are exact, so a share of a half is reached by two, not three."""
    p = probabilities(np.zeros(4, np.float32), Sampling(1.0, top_p=float(top_p)))
    assert np.flatnonzero(p).tolist() == kept
    assert p[kept].tolist() == [1 / len(kept)] * len(kept)


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 0.9), (0, 0.999), (0, 1e-6), (40, 1.0), (200, 0.95), (31_999, 1.0)]
)
@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0, 30.0])
def test_a_vocabulary_is_cut_as_sorting_all_of_it_would(top_k, top_p, spread):
    """Rounded to a grid, so that there are many equals; at a spread of 0 there are only equals."""
    logits = np.round(np.random.default_rng(0).standard_normal(32_000) * spread, 1).astype(np.float32)
    weights = np.exp(logits.astype(np.float64) - logits.max())
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    cumulative = np.cumsum(weights[order])
    order = order[: np.searchsorted(cumulative, top_p * cumulative[-1]) + 1]
    kept = np.flatnonzero(probabilities(logits, Sampling(1.0, top_k, top_p)))
    assert kept.tolist() == sorted(order.tolist())


def test_top_p_is_a_share_of_what_top_k_left():
    logits = np.array([0, 0, 0, 0, -1e4, -1e4], np.float32)
    assert np.flatnonzero(probabilities(logits, Sampling(1.0, top_k=2, top_p=0.5))).tolist() == [0]
    assert np.flatnonzero(probabilities(logits, Sampling(1.0, top_k=2, top_p=0.51))).tolist() == [0, 1]


def test_a_draw_on_the_border_of_two_tokens_is_the_second():
    """Tokens own [0, 1/4), [1/4, 1/2), ...: a draw of exactly 1/4 is no longer the first."""

    def drawn(number):
        return sample(np.zeros(4, np.float32), Sampling(1.0), SimpleNamespace(random=lambda: number))

    assert [drawn(number) for number in (0.0, 0.25, 0.5, 0.75)] == [0, 1, 2, 3]
    assert drawn(np.nextafter(0.25, 0)) == 0


def test_frequencies_follow_the_probabilities():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampling = Sampling(1.0, top_k=3, seed=0)
    generator = sampling.generator()
    counts = np.bincount([sample(logits, sampling, generator) for _ in range(20_000)], minlength=4)
    np.testing.assert_allclose(counts / counts.sum(), probabilities(logits, sampling), atol=0.01)
    assert counts[3] == 0


def test_the_last_kept_token_is_the_highest_draw():
    class Highest:
        def random(self):
            return np.nextafter(1.0, 0.0)

    logits = np.array([0.1, 0.7, 0.2, -1e9, -1e9], np.float32)
    assert sample(logits, Sampling(1.0, top_k=3), Highest()) == 2


@pytest.mark.parametrize("temperature", [1e-300, 1e-3])
def test_a_tiny_temperature_is_nearly_greedy(temperature):
    logits = np.array([1.0, 2.0, -1e4], np.float32)
    assert probabilities(logits, Sampling(temperature)).tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("top_p", float("nan")),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("seed", -1),
    ],
)
def test_bad_settings_name_their_field(field, value):
    with pytest.raises(UhdError, match=f"^{field}: "):
        Sampling(**{field: value})


def test_the_repetition_penalty_takes_from_the_tokens_of_the_answer():
    logits = np.array([2.0, -1.0, 0.5, 3.0], np.float32)
    harder = penalised(logits, [3, 1, 3], Sampling(repetition_penalty=2.0))
    assert harder.tolist() == [2.0, -2.0, 0.5, 1.5] and greedy(harder) == 0
    assert penalised(logits, [3], Sampling()) is logits
    assert penalised(logits, [], Sampling(repetition_penalty=2.0)) is logits
    with pytest.raises(UhdError, match="repetition_penalty: 0 is out of range"):
        Sampling(repetition_penalty=0)


def test_given_values_replace_the_defaults():
    default = Sampling(0.9, 50, 0.6, repetition_penalty=1.1)
    assert default.changed(temperature=0.0, top_k=None) == Sampling(0.0, 50, 0.6, repetition_penalty=1.1)
    assert default.changed() == default
