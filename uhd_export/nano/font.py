"""Ten digits of our own, so that images do not depend on any installed font or Pillow version."""

from functools import cache

import numpy as np

CELLS = (7, 5)  # rows, columns of a digit's drawing
GLYPH = (10, 6)  # rows, columns of a printed digit, in pixels
PITCH = 7  # pixels from one digit to the next
_DRAWINGS = (
    ".###. #...# #...# #...# #...# #...# .###.",
    "..#.. .##.. #.#.. ..#.. ..#.. ..#.. #####",
    ".###. #...# ....# ...#. ..#.. .#... #####",
    "####. ....# ....# .###. ....# ....# ####.",
    "#..#. #..#. #..#. ##### ...#. ...#. ...#.",
    "##### #.... ####. ....# ....# #...# .###.",
    "..##. .#... #.... ####. #...# #...# .###.",
    "##### ....# ...#. ..#.. ..#.. .#... .#...",
    ".###. #...# #...# .###. #...# #...# .###.",
    ".###. #...# #...# .#### ....# ...#. .##..",
)


def _area_weights(out: int, size: int) -> np.ndarray:
    """(out, size) matrix of area resampling: the share of each source cell in each output pixel."""
    edges = np.linspace(0, size, out + 1)
    low = np.maximum(edges[:-1, None], np.arange(size))
    high = np.minimum(edges[1:, None], np.arange(1, size + 1))
    return np.clip(high - low, 0, None) * out / size


@cache
def glyphs() -> np.ndarray:
    """Ink of the digits 0 to 9 in [0, 1], (10, rows, columns) float32, edges smoothed."""
    cells = np.array([[[c == "#" for c in row] for row in d.split()] for d in _DRAWINGS], np.float64)
    y, x = _area_weights(GLYPH[0], CELLS[0]), _area_weights(GLYPH[1], CELLS[1])
    return (y @ cells @ x.T).astype(np.float32)


def print_code(code: str) -> np.ndarray:
    """Ink of a row of digits, (GLYPH rows, PITCH * len - 1) float32 in [0, 1]."""
    table = glyphs()
    ink = np.zeros((GLYPH[0], PITCH * len(code) - 1), np.float32)
    for i, digit in enumerate(code):
        ink[:, i * PITCH : i * PITCH + GLYPH[1]] = table[int(digit)]
    return ink
