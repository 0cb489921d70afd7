"""Token layouts: the order in which crop tokens and separators enter the language model."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uhd_export.runtime.choices import LAYOUTS
from uhd_export.runtime.errors import UhdError

COMMA, NEWLINE = 29892, 13


@dataclass(frozen=True)
class Separators:
    """Token ids between slices: `comma` inside a row, `newline` at a row's end.

    The released code uses the Llama ids for every language model, Qwen2 included.
    """

    comma: int = COMMA
    newline: int = NEWLINE


def indicator_tokens(slice_grid: tuple[int, int] | None, separators: Separators) -> list[int]:
    """One separator a slice, row by row; none without slices. `slice_grid` is (columns, rows)."""
    if slice_grid is None:
        return []
    cols, rows = slice_grid
    return ([separators.comma] * (cols - 1) + [separators.newline]) * rows


def layout_indices(
    slice_grid: tuple[int, int] | None, *, layout: str, side: int, separators: Separators
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Where every visual position comes from.

    Returns two int64 arrays of one length: row numbers into the crops' tokens laid end to end
    (side*side a crop, slices first, overview last), -1 at separators; and token ids, -1 at visual
    rows. `slice_grid` is (columns, rows) or None. *flat* keeps each slice together; *merged* stitches the
    slices into one map (the paper's token organization).
    """
    per_crop = side * side
    cols, rows = slice_grid or (0, 0)
    slices = np.arange(cols * rows * per_crop).reshape(rows * cols, per_crop)
    overview = cols * rows * per_crop + np.arange(per_crop)
    indicators = indicator_tokens(slice_grid, separators)
    source: list[int] = []
    tokens: list[int] = []

    def visual(rows_: NDArray[Any]) -> None:
        source.extend(rows_)
        tokens.extend([-1] * len(rows_))

    def separator(token: int) -> None:
        source.append(-1)
        tokens.append(token)

    if layout == "flat":
        for rows_, token in zip(slices, indicators, strict=True):
            visual(rows_)
            separator(token)
    elif layout == "merged":
        if slice_grid is not None:
            stitched = slices.reshape(rows, cols, side, side).transpose(0, 2, 1, 3)
            for map_row in stitched.reshape(rows * side, cols * side):
                visual(map_row)
                separator(separators.newline)
            separator(indicators[0])
    else:
        raise UhdError(f"layout {layout!r}: must be one of {', '.join(LAYOUTS)}")
    visual(overview)
    return np.array(source, np.int64), np.array(tokens, np.int64)


def visual_token_count(slice_grid: tuple[int, int] | None, *, layout: str, side: int = 12) -> int:
    """Positions the image takes in the language model's context."""
    return len(layout_indices(slice_grid, layout=layout, side=side, separators=Separators())[0])
