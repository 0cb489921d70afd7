"""Launch plan of window attention: tile sizes and grids from shapes alone."""

from collections.abc import Sequence
from typing import NamedTuple

from uhd_export.plugins.launch import Launch, Scratch, power_of_two

LEVEL_INPUTS = ("features", "scale", "roi_y", "roi_x", "query", "query_scale", "query_mass")
OUTPUTS = ("attended",)
SETS = 4  # queries of a head in a window; the kernel mixes for four at a time
LEVELS = 4  # most that the kernel has arguments for
BINS = 4  # neighbouring bins that a program pools, as in the kernel
ROWS = 64  # of all crops of a window that a program scores
TILE = 32  # windows of a program that mixes and multiplies by the values


class LevelShape(NamedTuple):
    """What of a level's shape the launches depend on."""

    height: int
    width: int
    bins_y: int
    bins_x: int

    @property
    def rows(self) -> int:
        """Pooled rows of a window."""
        return self.bins_y * self.bins_x


def inputs(levels: int) -> tuple[str, ...]:
    """Names of the op's inputs in order; a level's end in its index."""
    own = (f"{name}_{i}" for i in range(levels) for name in LEVEL_INPUTS)
    return ("position", "value", "value_moments", *own)


def plan(
    levels: Sequence[LevelShape], *, batch: int, side: int, heads: int, size: int, channels: int, dtype: str
) -> tuple[tuple[Launch, ...], tuple[Scratch, ...]]:
    """All launches in order: pooling and scores of every level, the softmax, the values.

    Buffers: pooled rows (side^2, batch, all rows, channels), their scale and mass, and the scores (side^2,
    batch, all rows, queries), which become weights.
    """
    single = dtype == "float32"
    queries, places, total = SETS * heads, side * side * batch, sum(level.rows for level in levels)
    query_block = power_of_two(queries) if queries <= 128 else 64
    query_blocks = -(-queries // query_block)
    block = min(power_of_two(channels), 32 if single else 64)
    precision = ("PRECISION", "ieee" if single else "tf32")
    pooling: list[Launch] = []
    scores: list[Launch] = []
    first_row = 0
    for index, level in enumerate(levels):
        names = {name: f"{name}_{index}" for name in LEVEL_INPUTS}
        pooling.append(
            Launch(
                kernel="window_pool",
                grid=(batch, side * side, level.bins_y * -(-level.bins_x // BINS)),
                tensors=(*(names[name] for name in LEVEL_INPUTS[:4]), "pooled", "moments"),
                integers=(batch, *level, first_row, total),
                constants=(
                    ("SIDE", side),
                    ("CHANNELS", channels),
                    ("BLOCK", min(power_of_two(channels), 1024)),
                ),
                warps=4,
                stages=1,
            )
        )
        scores.append(
            Launch(
                kernel="window_scores",
                grid=(-(-batch * level.rows // ROWS), side * side, query_blocks),
                tensors=(
                    "pooled",
                    "moments",
                    "position",
                    *(names[name] for name in LEVEL_INPUTS[4:]),
                    "scores",
                ),
                integers=(batch, level.rows, first_row, total),
                constants=(
                    ("CHANNELS", channels),
                    ("QUERIES", queries),
                    ("QUERY_BLOCK", query_block),
                    ("ROWS", ROWS),
                    ("BLOCK", block),
                    precision,
                ),
                warps=8,
                stages=2 if single else 3,
            )
        )
        first_row += level.rows
    softmax = Launch(
        kernel="window_softmax",
        grid=(places, query_blocks, 1),
        tensors=("scores",),
        integers=(total,),
        constants=(("QUERIES", queries), ("QUERY_BLOCK", query_block)),
        warps=4,
        stages=1,
    )
    tile = TILE // 2 if single else TILE
    values = Launch(
        kernel="window_values",
        grid=(heads, -(-places // tile), 1),
        tensors=("pooled", "moments", "scores", "value", "value_moments", *OUTPUTS),
        integers=(batch, places, total, *(level.rows for level in levels), *(LEVELS - len(levels)) * (0,)),
        constants=(
            ("WINDOWS", side * side),
            ("LEVELS", len(levels)),
            ("CHANNELS", channels),
            ("HEADS", heads),
            ("SIZE", size),
            ("SIZE_BLOCK", power_of_two(size)),
            ("TILE", tile),
            ("BLOCK", block),
            precision,
        ),
        warps=8,
        stages=1,
        registers=None if single else 128,
    )
    scratch = (
        Scratch("pooled", places * total * channels, dtype),
        Scratch("moments", places * total * 2),
        Scratch("scores", places * total * queries),
    )
    return (*pooling, *scores, softmax, values), scratch
