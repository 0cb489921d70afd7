"""Choosing a token for one request: penalties and biases on the logits, then sampling."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.language.sampling import penalised, sample
from uhd_export.runtime.settings import Sampling


@dataclass(frozen=True)
class Choosing:
    """How tokens are chosen. The default is greedy.

    `frequency_penalty` is subtracted once for each time a token is in the answer, `presence_penalty` once for
    any. `logit_bias` is added by token. `logprobs` is how many of the likeliest tokens are told with each;
    None tells nothing.
    """

    sampling: Sampling = field(default_factory=Sampling)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether all that counts is which logit is the highest."""
        penalised = self.presence_penalty != 0 or self.frequency_penalty != 0
        return self.sampling.greedy and not (penalised or self.logit_bias) and self.logprobs is None

    def __post_init__(self) -> None:
        """Raise UhdError naming a field that is out of range."""
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise UhdError(f"{name}: {getattr(self, name)} is out of range; use -2 to 2")
        if any(not -100 <= bias <= 100 for bias in self.logit_bias.values()):
            raise UhdError("logit_bias: a value is out of range; use -100 to 100")


@dataclass(frozen=True)
class Chosen:
    """A token, the logarithm of its probability, and the likeliest tokens with theirs."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Chooser:
    """The tokens of one answer, one after the other."""

    def __init__(self, choosing: Choosing, vocab: int) -> None:
        bad = next((token for token in choosing.logit_bias if not 0 <= token < vocab), None)
        if bad is not None:
            raise UhdError(f"logit_bias: token {bad} is outside the vocabulary of {vocab}")
        self._choosing, self._random = choosing, choosing.sampling.generator()
        self._counts: Counter[int] = Counter()

    def choose(self, logits: NDArray[Any], allowed: NDArray[Any] | None = None) -> Chosen:
        """One token from float32 (vocab,) `logits`, among those that `allowed`, bool (vocab,), admits."""
        adjusted = self._adjust(logits)
        if allowed is not None:
            adjusted = np.where(allowed, adjusted, -np.inf)
        token = sample(adjusted, self._choosing.sampling, self._random)
        self._counts[token] += 1
        count = self._choosing.logprobs
        if count is None:
            return Chosen(token)
        logprobs = log_softmax(logits)
        best = np.argpartition(-logprobs, count)[:count] if count < len(logprobs) else np.arange(len(logits))
        top = sorted(((int(i), float(logprobs[i])) for i in best), key=lambda pair: (-pair[1], pair[0]))
        return Chosen(token, float(logprobs[token]), tuple(top))

    def _adjust(self, logits: NDArray[Any]) -> NDArray[Any]:
        """`logits` with penalties and biases; the array itself where there are none."""
        choosing = self._choosing
        logits = penalised(logits, list(self._counts), choosing.sampling)
        counted = choosing.presence_penalty != 0 or choosing.frequency_penalty != 0
        if not (counted or choosing.logit_bias):
            return logits
        logits = logits.astype(np.float32, copy=True)
        if counted and self._counts:
            answered = np.fromiter(self._counts, np.int64, len(self._counts))
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            logits[answered] -= choosing.presence_penalty + choosing.frequency_penalty * counts
        for token, bias in choosing.logit_bias.items():
            logits[token] += bias
        return logits


def log_softmax(logits: NDArray[Any]) -> NDArray[Any]:
    """float64 (vocab,) logarithms of the probabilities, before any temperature or penalty."""
    shifted: NDArray[np.float64] = logits.astype(np.float64) - logits.max()
    shifted -= np.log(np.exp(shifted).sum())
    return shifted
