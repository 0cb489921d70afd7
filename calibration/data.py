"""Image-question pairs drawn by the embedded model's own generator, and pairs without doubles."""

import numpy as np

from uhd_export.calibration.options import CalibrationOptions
from uhd_export.nano.cards import make_card_image
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.language.pairs import Pair, Turn, read_pairs

# The embedded model trains on set 1 and is evaluated on set 2; 3 are its sample images.
CALIBRATION_SEED = 4


def card_pairs(count: int, seed: int) -> list[Pair]:
    """`count` drawn images, each with one question and its answer. The built-in data."""
    pairs = []
    for index in range(count):
        key = (CALIBRATION_SEED, seed, index)
        image, cards = make_card_image(key)
        card = cards[int(np.random.default_rng((*key, 1)).integers(len(cards)))]
        pairs.append(Pair((image,), (Turn(card.question, card.code),), f"card image {index}"))
    return pairs


def calibration_pairs(options: CalibrationOptions, count: int) -> list[Pair]:
    """`count` pairs that have images, chosen by the seed, from the data or drawn."""
    if options.data is None:
        return card_pairs(count, options.seed)
    pairs = [pair for pair in read_pairs(options.data, options.image_root) if pair.images]
    if not pairs:
        raise UhdError(f"{options.data}: holds no image to calibrate on")
    order = np.random.default_rng(options.seed).permutation(len(pairs))
    return [pairs[index] for index in order[:count]]


def without_duplicates(pairs: list[Pair]) -> list[Pair]:
    """Each pair once: one on both sides would be judged by what it was calibrated on."""
    first: dict[tuple, Pair] = {}
    for pair in pairs:
        first.setdefault((pair.images, pair.turns), pair)
    return list(first.values())
