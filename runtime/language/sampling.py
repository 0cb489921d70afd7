"""Choosing the next token from logits: greedy, or sampling with temperature, top-k, top-p and min-p."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uhd_export.runtime.settings import Sampling

# Tokens that are put in order first where top-p alone decides how many are kept.
_FIRST_TRY = 64


def penalised(logits: NDArray[Any], answer: Sequence[int], sampling: Sampling) -> NDArray[Any]:
    """(vocab,) logits with the repetition penalty on the tokens of `answer`."""
    if sampling.repetition_penalty == 1 or not answer:
        return logits
    seen, changed = np.unique(np.asarray(answer, np.int64)), logits.copy()
    values, penalty = logits[seen], logits.dtype.type(sampling.repetition_penalty)
    changed[seen] = np.where(values < 0, values * penalty, values / penalty)
    return changed


def greedy(logits: NDArray[Any]) -> int:
    """The most probable token of (vocab,) logits; the lowest id among equals."""
    return int(np.argmax(logits))


def probabilities(logits: NDArray[Any], sampling: Sampling) -> NDArray[Any]:
    """What `sample` draws from: (vocab,) float64 that sum to 1, zero for tokens left out.

    Temperature comes first, then min-p, then top-k, then top-p of what top-k left. Tokens as probable as the
    last one that top-k admits are cut by id, so that exactly k remain. Nucleus: arXiv 1904.09751, 3.1.
    """
    if sampling.temperature == 0:
        one_hot = np.zeros(logits.shape, np.float64)
        one_hot[greedy(logits)] = 1.0
        return one_hot
    # The maximum goes first, so that a small temperature divides nothing but zero and negative numbers.
    wide = logits.astype(np.float64)
    with np.errstate(over="ignore"):
        weights: NDArray[np.float64] = np.exp((wide - wide.max()) / sampling.temperature)
    if sampling.min_p:
        weights[weights < sampling.min_p] = 0.0  # the largest weight is 1
    if sampling.top_k == 0 and sampling.top_p == 1:
        shares: NDArray[np.float64] = weights / weights.sum()
        return shares
    order = _nucleus(logits, weights, sampling)
    nucleus = np.zeros_like(weights)
    nucleus[order] = weights[order]
    nucleus /= nucleus.sum()
    return nucleus


def _nucleus(logits: NDArray[Any], weights: NDArray[Any], sampling: Sampling) -> NDArray[Any]:
    """Ids of the tokens that top-k and top-p keep, the most probable first.

    A vocabulary of 32,000 takes milliseconds to sort, and nearly all of it is thrown away: only as many as
    make up top-p are put in order, found by trying more and more.
    """
    count = sampling.top_k or _FIRST_TRY
    total = None if sampling.top_k else weights.sum()
    while True:
        order = _leading(logits, count)
        cumulative = np.cumsum(weights[order])
        wanted = sampling.top_p * (cumulative[-1] if total is None else total)
        if cumulative[-1] >= wanted or count >= logits.size:
            # The token that reaches top_p belongs to the nucleus; the first always does.
            return order[: int(np.searchsorted(cumulative, wanted, side="left")) + 1]
        count *= 8


def _leading(logits: NDArray[Any], count: int) -> NDArray[Any]:
    """Ids of the `count` greatest, in falling order; the lower id first among equals."""
    if count >= logits.size:
        return np.argsort(-logits, kind="stable")
    border = np.partition(logits, logits.size - count)[logits.size - count]
    above = np.flatnonzero(logits > border)
    chosen = np.concatenate([above, np.flatnonzero(logits == border)[: count - len(above)]])
    return chosen[np.argsort(-logits[chosen], kind="stable")]


def sample(logits: NDArray[Any], sampling: Sampling, generator: np.random.Generator) -> int:
    """One token from (vocab,) logits; draws one number from `generator` unless greedy."""
    if sampling.temperature == 0:
        return greedy(logits)
    cumulative = np.cumsum(probabilities(logits, sampling))
    # Scaled by the last sum, which rounding leaves beside 1, a draw below 1 never passes the last kept token.
    return int(np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right"))
