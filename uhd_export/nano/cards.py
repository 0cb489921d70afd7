"""Images of coloured cards with a short code in small print, and questions about them.

Everything is drawn here with numpy, so an image depends on its seed alone. The print is 10 pixels
high: legible in the slices of a 1008x672 image, where a pixel stays a pixel, and 4 pixels high in
the 406x266 overview, where it is not. Needs no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from uhd_export.nano.font import GLYPH, PITCH, print_code

# A Hiwin window of a 336x336 slice: 2x2 patches of 14 pixels. Cards lie on this grid, so that a
# code is never cut by a slice's border.
WINDOW = 28
IMAGE_SIZE = (1008, 672)
DIGITS = 3
# Seeds of images: the first number of the pair names the set, the second the image. Training draws
# from TRAIN_SEED only.
TRAIN_SEED, HELD_OUT_SEED = 1, 2
COLOURS = {
    "red": (226, 84, 76),
    "orange": (244, 156, 62),
    "yellow": (240, 222, 88),
    "green": (96, 186, 92),
    "cyan": (98, 208, 216),
    "blue": (92, 132, 234),
    "purple": (164, 104, 206),
    "pink": (246, 166, 204),
}
NAMES = tuple(COLOURS)
Box = tuple[int, int, int, int]
Seed = int | Sequence[int]


@dataclass(frozen=True)
class Card:
    """One card: its colour's name, its code, and pixel boxes (left, top, right, bottom)."""

    colour: str
    code: str
    box: Box
    print_box: Box

    @property
    def question(self) -> str:
        """The question whose answer is this card's code."""
        return question(self.colour)


def question(colour: str) -> str:
    """The question about the card of `colour`."""
    return f"What is the code on the {colour} card?"


def make_card_image(seed: Seed, size: tuple[int, int] = IMAGE_SIZE) -> tuple[Image.Image, list[Card]]:
    """An RGB image of four to six cards of different colours, and the cards.

    `seed` is whatever numpy's default_rng takes; `size` (width, height) are multiples of 28.
    """
    rng = np.random.default_rng(seed)
    columns, rows = size[0] // WINDOW, size[1] // WINDOW
    canvas = background(rng, size)
    taken = np.zeros((rows, columns), bool)
    names = [NAMES[i] for i in rng.permutation(len(NAMES))[: rng.integers(4, 7)]]
    cards = []
    for colour in names:
        w, h = int(rng.integers(3, 8)), int(rng.integers(3, 6))
        for _ in range(200):
            x, y = int(rng.integers(0, columns - w + 1)), int(rng.integers(0, rows - h + 1))
            # One free window between neighbours.
            if not taken[max(y - 1, 0) : y + h + 1, max(x - 1, 0) : x + w + 1].any():
                break
        else:
            continue
        taken[y : y + h, x : x + w] = True
        draw_card(rng, canvas, colour, (x, y, x + w, y + h))
        code = f"{rng.integers(10**DIGITS):0{DIGITS}d}"
        at = x + int(rng.integers(w)), y + int(rng.integers(h))
        box = (WINDOW * x, WINDOW * y, WINDOW * (x + w), WINDOW * (y + h))
        cards.append(Card(colour, code, box, draw_code(rng, canvas, code, at)))
    return Image.fromarray(to_pixels(canvas)), cards


def background(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A grey table top with a coarse texture, (height, width, 3) float32 in 0..255."""
    cell = 7
    width, height = size
    tone = rng.uniform(70, 200) + rng.uniform(-8, 8, 3)
    texture = rng.normal(0, 9, (height // cell, width // cell, 1)) + rng.normal(0, 2, (1, width // cell, 3))
    return np.repeat(np.repeat((tone + texture).astype(np.float32), cell, 0), cell, 1)


def draw_card(rng: np.random.Generator, canvas: np.ndarray, colour: str, windows: Box) -> None:
    """Paint a card over `windows` (left, top, right, bottom in windows), its colour varied a little."""
    left, top, right, bottom = (WINDOW * v for v in windows)
    paint = np.array(COLOURS[colour]) + rng.normal(0, 5, 3) + rng.normal(0, 5)
    fibres = rng.normal(0, 2, (bottom - top, 1, 1))
    canvas[top:bottom, left:right] = paint + fibres
    for edge in (canvas[top : top + 1, left:right], canvas[bottom - 1 : bottom, left:right]):
        edge *= 0.7
    for edge in (canvas[top:bottom, left : left + 1], canvas[top:bottom, right - 1 : right]):
        edge *= 0.7


def draw_code(rng: np.random.Generator, canvas: np.ndarray, code: str, window: tuple[int, int]) -> Box:
    """Print `code` in dark ink inside `window` (column, row), moved by some pixels; its pixel box.

    The print stays within the upper or the lower half of its window, and starts at its left, so that no
    digit lies across the border of two 14-pixel patches: one that does takes very long to learn.
    """
    height, width = GLYPH[0], PITCH * len(code) - 1
    x = WINDOW * window[0] + int(rng.integers(2))
    half = WINDOW // 2
    y = WINDOW * window[1] + half * int(rng.integers(2)) + (half - height) // 2 + int(rng.integers(-1, 2))
    ink = rng.uniform(10, 45)
    cover = print_code(code)[..., None]
    region = canvas[y : y + height, x : x + width]
    region += cover * (ink - region)
    return x, y, x + width, y + height


def to_pixels(canvas: np.ndarray) -> np.ndarray:
    """uint8 pixels of a float canvas."""
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
