"""Launch plan of window attention: tile sizes and grids from shapes alone."""

from collections.abc import Sequence
from typing import NamedTuple

from uhd_export.plugins.launch import Constant, Launch, Scratch, power_of_two

LEVEL_INPUTS = (
    "features",
    "scale",
    "roi_y",
    "roi_x",
    "position_y",
    "position_x",
    "query",
    "query_scale",
    "query_mass",
)
LEVEL_OUTPUTS = ("rows", "moments")
PIXELS = (16, 32, 64, 128)  # pixels that a launch takes of a window, by need
PIXELS_FLOAT32 = PIXELS[:-1]  # 128 would need more shared memory than consumer GPUs have
CHANNELS_A_PROGRAM = 512  # of the mixing kernel: enough programs for a large GPU at one crop


class LevelShape(NamedTuple):
    """What of a level's shape the launches depend on."""

    height: int
    width: int
    bins_y: int
    bins_x: int


def inputs(levels: int) -> tuple[str, ...]:
    """Names of the op's inputs in order; a level's end in its index."""
    return ("query_position", *(f"{name}_{i}" for i in range(levels) for name in LEVEL_INPUTS))


def outputs(levels: int) -> tuple[str, ...]:
    """Names of the op's outputs in order."""
    return tuple(f"{name}_{i}" for i in range(levels) for name in LEVEL_OUTPUTS)


def reach(size: int, side: int) -> int:
    """Most pixels along an axis that RoIAlign of one of `side` equal windows over `size` pixels touches.

    Samples lie inside the window and bilinear weights reach one pixel further. Boxes rounded to
    bfloat16 are longer by up to size / 256 (two edges, each off by 2^-9 of its coordinate).
    """
    return min(int(max(size / side, 1) + size / 256) + 3, size)


def pixels_at_once(level: LevelShape, side: int, dtype: str) -> int:
    """How many pixels of a window one launch takes: all that a window touches, or the most that fit."""
    sizes = PIXELS_FLOAT32 if dtype == "float32" else PIXELS
    return next((size for size in sizes if size >= _area(level, side)), sizes[-1])


def _area(level: LevelShape, side: int) -> int:
    """Most pixels that a window touches."""
    return reach(level.height, side) * reach(level.width, side)


def plan(
    levels: Sequence[LevelShape],
    *,
    batch: int,
    side: int,
    queries: int,
    sets: int,
    channels: int,
    dtype: str,
    pixels: int | None = None,
) -> tuple[tuple[Launch, ...], Scratch]:
    """All launches in order, and the buffer for the scores, (side^2, batch, all rows, queries).

    Two kernels run for every level: the scores of all levels first, then the mixing. A level whose
    windows touch more than 128 pixels (64 in float32) takes several launches, each adding its pixels.
    `pixels` replaces the choice of how many a launch takes.
    """
    single = dtype == "float32"
    query_block = power_of_two(queries) if queries <= 128 else 64
    query_blocks = -(-queries // query_block)
    block = min(power_of_two(channels), 32 if single else 64)
    span = max(CHANNELS_A_PROGRAM // block, 1)  # blocks a program
    groups = -(-channels // (span * block))
    total = sum(level.bins_y * level.bins_x for level in levels)
    scores: list[Launch] = []
    mixing: list[Launch] = []
    first_row = 0
    for index, level in enumerate(levels):
        step = pixels or pixels_at_once(level, side, dtype)
        constants: tuple[tuple[str, Constant], ...] = (
            ("SIDE", side),
            ("CHANNELS", channels),
            ("QUERIES", queries),
            ("QUERY_BLOCK", query_block),
            ("BLOCK", block),
            ("PIXELS", step),
            ("PRECISION", "ieee" if single else "tf32"),
        )
        own = tuple(f"{name}_{index}" for name in LEVEL_INPUTS)
        for first_pixel in range(0, _area(level, side), step):
            integers = (batch, *level, first_row, total, first_pixel)
            scores.append(
                Launch(
                    kernel="window_scores",
                    grid=(batch, side * side, query_blocks),
                    tensors=("query_position", *own, "scores"),
                    integers=integers,
                    constants=constants,
                    warps=4 if step < 64 else 8,
                    stages=2,
                )
            )
            mixing.append(
                Launch(
                    kernel="window_mixing",
                    grid=(batch, side * side, query_blocks * groups),
                    tensors=(*own[:4], "scores", *(f"{name}_{index}" for name in LEVEL_OUTPUTS)),
                    integers=(*integers, span),
                    constants=(*constants, ("SETS", sets)),
                    warps=8,
                    stages=2,
                )
            )
        first_row += level.bins_y * level.bins_x
    return (*scores, *mixing), Scratch("scores", side * side * batch * total * queries)
