"""Choosing the next token from logits: greedy, or sampling with temperature, top-k and top-p."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uhd_export.runtime.errors import UhdError


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. The default is greedy; so is temperature 0.

    `top_k` keeps the k most probable tokens (0: all); `top_p` then keeps the fewest that together reach
    this probability (1: all); `seed` makes the choices repeatable.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Raise UhdError naming a field that is out of range."""
        if not 0 <= self.temperature < float("inf"):
            raise UhdError(f"temperature: {self.temperature} is out of range; use 0 (greedy) or more")
        if self.top_k < 0:
            raise UhdError(f"top_k: {self.top_k} is out of range; use 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise UhdError(f"top_p: {self.top_p} is out of range; use more than 0 and at most 1")
        if self.seed is not None and self.seed < 0:
            raise UhdError(f"seed: {self.seed} is out of range; use 0 or more")

    def generator(self) -> np.random.Generator:
        """A new generator from the seed, one for each answer."""
        return np.random.default_rng(self.seed)


def greedy(logits: NDArray[Any]) -> int:
    """The most probable token of (vocab,) logits; the lowest id among equals."""
    return int(np.argmax(logits))


def probabilities(logits: NDArray[Any], sampling: Sampling) -> NDArray[Any]:
    """What `sample` draws from: (vocab,) float64 that sum to 1, zero for tokens left out.

    Temperature comes first, then top-k, then top-p of what top-k left. Tokens as probable as the last one
    that top-k admits are cut by id, so that exactly k remain. Nucleus: arXiv 1904.09751, section 3.1.
    """
    if sampling.temperature == 0:
        one_hot = np.zeros(logits.shape, np.float64)
        one_hot[greedy(logits)] = 1.0
        return one_hot
    scaled = logits.astype(np.float64)
    # The maximum goes first, so that a small temperature divides nothing but zero and negative numbers.
    with np.errstate(over="ignore"):
        weights = np.exp((scaled - scaled.max()) / sampling.temperature)
    if sampling.top_k == 0 and sampling.top_p == 1:
        return weights / weights.sum()
    order = np.argsort(-scaled, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    cumulative = np.cumsum(weights[order])
    # The token that reaches top_p belongs to the nucleus; the first always does.
    size = int(np.searchsorted(cumulative, sampling.top_p * cumulative[-1], side="left")) + 1
    order = order[:size]
    kept = np.zeros_like(weights)
    kept[order] = weights[order]
    return kept / kept.sum()


def sample(logits: NDArray[Any], sampling: Sampling, generator: np.random.Generator) -> int:
    """One token from (vocab,) logits; draws one number from `generator` unless greedy."""
    if sampling.temperature == 0:
        return greedy(logits)
    cumulative = np.cumsum(probabilities(logits, sampling))
    # Scaled by the last sum, which rounding leaves beside 1, a draw below 1 never passes the last kept token.
    return int(np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right"))
