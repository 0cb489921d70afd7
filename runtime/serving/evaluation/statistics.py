"""How sure an average is: bootstrap intervals, of one bundle's scores and of the difference of two."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_DRAWS, _CHUNK = 10_000, 500


@dataclass(frozen=True)
class Estimate:
    """An average, and the interval in which 95 % of the averages lie that were drawn again."""

    mean: float
    low: float
    high: float
    count: int


def estimate(scores: Sequence[float], seed: int = 0) -> Estimate:
    """The average of `scores` with its percentile bootstrap interval (Efron 1979): questions drawn again."""
    values = np.asarray(scores, np.float64)
    if not len(values):
        raise ValueError("no scores")
    low, high = np.percentile(_draws(values, seed), [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high), len(values))


def paired(scores: Sequence[float], others: Sequence[float], seed: int = 0) -> Estimate:
    """The average of `others` minus `scores`, question by question: what both find hard cancels out."""
    return estimate(np.subtract(others, scores).tolist(), seed)


def _draws(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Averages of `values` drawn with replacement: how often each is drawn is multinomial."""
    random, count = np.random.default_rng(seed), len(values)
    shares = np.full(count, 1 / count)
    chunks = (random.multinomial(count, shares, _CHUNK) @ values for _ in range(_DRAWS // _CHUNK))
    drawn: NDArray[np.float64] = np.concatenate(list(chunks)) / count
    return drawn
