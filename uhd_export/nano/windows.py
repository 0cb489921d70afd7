"""Labelled crops for the dense loss: what each of the 144 Hiwin windows of a crop shows."""

from dataclasses import dataclass

import numpy as np

from uhd_export.nano import cards
from uhd_export.nano.cards import DIGITS, NAMES, WINDOW, Card
from uhd_export.runtime.image.pixels import cut
from uhd_export.runtime.image.slicing import plan_slices

SIDE = 12
NO_COLOUR, IGNORE = 0, -100


@dataclass(frozen=True)
class LabelledCrop:
    """uint8 pixels (h, w, 3) and int64 labels (144, 2 + DIGITS).

    Columns: colour (0 none, 1.. in the order of NAMES), whether a code is printed in the window,
    and its digits; IGNORE where there is nothing to learn.
    """

    pixels: np.ndarray
    labels: np.ndarray


def packed_slice(rng: np.random.Generator) -> LabelledCrop:
    """A 336x336 slice full of cards, most of their windows with a code: many labels a crop."""
    canvas = cards.background(rng, (SIDE * WINDOW, SIDE * WINDOW))
    labels = np.full((SIDE, SIDE, 2 + DIGITS), IGNORE, np.int64)
    labels[..., 0], labels[..., 1] = NO_COLOUR, 0
    for _ in range(int(rng.integers(6, 20))):
        w, h = rng.integers(2, 7, 2)
        x, y = rng.integers(0, SIDE - w + 1), rng.integers(0, SIDE - h + 1)
        index = int(rng.integers(len(NAMES)))
        cards.draw_card(rng, canvas, NAMES[index], (x, y, x + w, y + h))
        labels[y : y + h, x : x + w, 0] = index + 1
    # RoIAlign without the half-pixel shift mixes a window's last bins with its right neighbour's first
    # patches, so side by side two codes are ambiguous until the attention is sharp: leave gaps.
    gaps = (np.arange(SIDE) + rng.integers(2, size=(SIDE, 1))) % 2 == 0
    with_code = (labels[..., 0] > 0) & gaps & (rng.random((SIDE, SIDE)) < rng.uniform(0.4, 1))
    for row, col in zip(*np.nonzero(with_code), strict=True):
        code = f"{rng.integers(10**DIGITS):0{DIGITS}d}"
        cards.draw_code(rng, canvas, code, (int(col), int(row)))
        labels[row, col, 1:] = 1, *map(int, code)
    return LabelledCrop(cards.to_pixels(canvas), labels.reshape(SIDE * SIDE, -1))


def label_map(image_cards: list[Card], size: tuple[int, int]) -> np.ndarray:
    """Labels of every 28-pixel window of an image, (rows, columns, 2 + DIGITS)."""
    labels = np.full((size[1] // WINDOW, size[0] // WINDOW, 2 + DIGITS), IGNORE, np.int64)
    labels[..., 0], labels[..., 1] = NO_COLOUR, 0
    for card in image_cards:
        left, top, right, bottom = (v // WINDOW for v in card.box)
        labels[top:bottom, left:right, 0] = NAMES.index(card.colour) + 1
        labels[card.print_box[1] // WINDOW, card.print_box[0] // WINDOW, 1:] = 1, *map(int, card.code)
    return labels


def image_crops(seed: cards.Seed) -> list[LabelledCrop]:
    """The seven labelled crops of a card image, cut as the model cuts it, the overview last.

    A window of the overview covers 3x2 windows of the image: it is labelled where these show one
    colour, and never has a code, as nobody could read it.
    """
    image, image_cards = cards.make_card_image(seed)
    plan = plan_slices(image.size)
    pixels = cut(image, plan)
    labels = label_map(image_cards, image.size)
    if plan.slice_grid is None:
        raise ValueError(f"an image of {image.size} has no slices")
    columns, rows = plan.slice_grid
    out = []
    for i, crop in enumerate(pixels[:-1]):
        y, x = SIDE * (i // columns), SIDE * (i % columns)
        out.append(LabelledCrop(crop, labels[y : y + SIDE, x : x + SIDE].reshape(SIDE * SIDE, -1)))
    colour = labels[..., 0].reshape(SIDE, rows, SIDE, columns).transpose(0, 2, 1, 3).reshape(SIDE * SIDE, -1)
    overview = np.full((SIDE * SIDE, 2 + DIGITS), IGNORE, np.int64)
    overview[:, 1] = 0
    pure = (colour == colour[:, :1]).all(1)
    overview[pure, 0] = colour[pure, 0]
    out.append(LabelledCrop(pixels[-1], overview))
    return out
