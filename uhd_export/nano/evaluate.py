"""How many questions about held-out card images a model answers exactly, whatever runs it.

Needs no torch: `answer` may be the PyTorch model, a bundle on a device, or a person.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from uhd_export.nano.cards import HELD_OUT_SEED, make_card_image

Answer = Callable[[Image.Image, str], str]


@dataclass(frozen=True)
class Miss:
    """A question answered wrongly; `index` is the image's number in the set."""

    index: int
    question: str
    expected: str
    got: str


@dataclass(frozen=True)
class EvalResult:
    """`exact` of `total` answers were right to the last digit."""

    exact: int
    total: int
    misses: tuple[Miss, ...] = field(default=())

    @property
    def accuracy(self) -> float:
        """Share of exact answers, 0 to 1."""
        return self.exact / self.total if self.total else 0.0


def held_out_question(index: int, seed: int = HELD_OUT_SEED) -> tuple[Image.Image, str, str]:
    """Image `index` of the set `seed`, one question about it, and the code expected."""
    image, cards = make_card_image((seed, index))
    card = cards[int(np.random.default_rng((seed, index, 1)).integers(len(cards)))]
    return image, card.question, card.code


def evaluate(
    answer: Answer,
    count: int = 200,
    seed: int = HELD_OUT_SEED,
    progress: Callable[[int, int], None] | None = None,
) -> EvalResult:
    """Ask one question about each of `count` images and count exact answers.

    `answer(image, question)` returns text, whose outer white space does not matter; `progress` is
    called with (done, count) after every image.
    """
    misses = []
    for index in range(count):
        image, question, expected = held_out_question(index, seed)
        got = answer(image, question).strip()
        if got != expected:
            misses.append(Miss(index, question, expected, got))
        if progress is not None:
            progress(index + 1, count)
    return EvalResult(count - len(misses), count, tuple(misses))
