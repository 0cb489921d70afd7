"""Optimization profiles from the model's own geometry: every crop that slice planning can produce.

A profile is a box of shapes, while crops lie along a hyperbola (about 576 patches of any aspect ratio).
So the ratios are cut into bands and each gets the box around its crops.
"""

import itertools
import math
from collections.abc import Iterable

from uhd_export.checkpoint.config import CheckpointConfig
from uhd_export.runtime.choices import GRID_MODES
from uhd_export.runtime.config import LanguageConfig
from uhd_export.runtime.engines.tensorrt.record import OptimizationProfile, Shape, ShapeRange
from uhd_export.runtime.image.encoder import MAX_BATCH, PIXELS
from uhd_export.runtime.image.geometry import bin_grid
from uhd_export.runtime.image.slicing import PATCH, SCALE_RESOLUTION
from uhd_export.runtime.language.decoder import EMBEDS, VISIBLE, visible_sizes

Grid = tuple[int, int]
# Where the bands meet, as cols / rows. Slices lie in the middle one (unless an image is nine times as long
# as wide), overviews in any.
BAND_EDGES = (1 / 4, 1 / 1.6, 1.6, 4)
# Crops to tune for: six slices of a 1008x672 image at once; elongated ones are overviews, one at a time.
SLICES = 6


def possible_grids(*, scale: int = SCALE_RESOLUTION, patch: int = PATCH) -> list[Grid]:
    """Every (rows, cols) of patches that `plan_slices` can produce, at least 2 on each side.

    (Thinner crops, of images over 144 times as long as wide, have no feature pyramid.) All crops are
    fitted to scale^2 pixels by their ratio r alone: height int(scale / sqrt(r)), width int(height * r).
    For each height the ratios that give it are an interval, hence the widths too.
    """
    grids: set[Grid] = set()
    height = 2 * patch
    # As wide as the widest crop of this height, while that has two columns.
    while (last := int(height * (scale / height) ** 2)) >= 2 * patch:
        first = int(height * (scale / (height + 1)) ** 2)
        columns = range(max(first // patch, 2), last // patch + 1)
        grids.update((height // patch, cols) for cols in columns)
        height += 1
    return sorted(grids)


def vision_profiles(
    config: CheckpointConfig, *, max_batch: int = MAX_BATCH, bands: int = 5
) -> list[OptimizationProfile]:
    """Profiles that together hold every crop shape, grid mode and batch of 1 to `max_batch`.

    `bands` is 5, or 1 for a single box around everything, which builds faster and runs no slower where
    kernels are specialised at run time, but plans for shapes that never occur.
    """
    grids = possible_grids(patch=config.vision.patch)
    edges = (0.0, *(BAND_EDGES if bands > 1 else ()), math.inf)
    profiles = []
    for low, high in itertools.pairwise(edges):
        members = [(rows, cols) for rows, cols in grids if low <= cols / rows < high]
        profiles.append(_profile(config, members, max_batch))
    # The middle band first: the first profile that holds a shape is taken.
    return sorted(profiles, key=lambda p: p.name != _name((24, 24)))


def language_profiles(
    config: LanguageConfig, context: int, *, prefill: int | None = None
) -> list[OptimizationProfile]:
    """Profiles to decode a position at a time, one for each part of the cache that may be in use.

    And one for prompts of up to `prefill` positions (default: context).
    """
    longest, sizes = min(prefill or context, context), visible_sizes(context)

    def profile(name: str, lengths: tuple[int, ...], seen: tuple[int, ...]) -> OptimizationProfile:
        embeds = ShapeRange(*((1, length, config.hidden) for length in lengths))
        return OptimizationProfile(name, {EMBEDS: embeds, VISIBLE: ShapeRange(*((size,) for size in seen))})

    decode = [profile(f"decode {size}", (1, 1, 1), (size, size, size)) for size in sizes]
    # A 1008x672 image and a question take about 1060 positions.
    usual = min(1060, longest)
    # TensorRT-RTX 1.7.1 ends the process where prompts see one size alone and attention adds up in float32.
    least = sizes[0] if len(sizes) > 1 else 1
    prompts = (1, usual, longest), (least, next(size for size in sizes if size >= usual), context)
    return [*decode, profile("prefill", *prompts)]


def _profile(config: CheckpointConfig, members: list[Grid], max_batch: int) -> OptimizationProfile:
    """The box around `members`."""
    rows, cols = zip(*members, strict=True)
    middle = min(members, key=lambda grid: _distance(grid, members))
    batch = min(SLICES, max_batch) if middle == (24, 24) else 1
    shapes_min = _shapes(config, min(rows), min(cols), 1)
    shapes_opt = _shapes(config, *middle, batch)
    shapes_max = _shapes(config, max(rows), max(cols), max_batch)
    for scale in config.projector.levels:
        bins = [bin_grid(*grid, scale, mode) for grid in members for mode in GRID_MODES]
        for axis, sizes in zip("yx", zip(*bins, strict=True), strict=True):
            for name in (f"roi_{scale}x_{axis}", f"window_position_{scale}x_{axis}"):
                shapes_min[name] = _with_bins(shapes_min[name], min(sizes))
                shapes_max[name] = _with_bins(shapes_max[name], max(sizes))
    ranges = {n: ShapeRange(shapes_min[n], shapes_opt[n], shapes_max[n]) for n in shapes_opt}
    return OptimizationProfile(_name(middle), ranges)


def _distance(grid: Grid, members: Iterable[Grid]) -> float:
    """How far `grid` is from the middle of the band; the whole table's size is the middle where it is in."""
    if (24, 24) in members:
        return abs(grid[0] - 24) + abs(grid[1] - 24)
    ratios = sorted(math.log(cols / rows) for rows, cols in members)
    return abs(math.log(grid[1] / grid[0]) - ratios[len(ratios) // 2])


def _name(grid: Grid) -> str:
    return f"{grid[0]}x{grid[1]}"


def _shapes(config: CheckpointConfig, rows: int, cols: int, batch: int) -> dict[str, Shape]:
    """Shapes of the vision graph's inputs for `batch` crops of rows x cols patches."""
    patch = config.vision.patch
    shapes = {name: tuple(matrix.shape) for name, matrix in config.model.geometry(rows, cols).items()}
    return {PIXELS: (batch, 3, rows * patch, cols * patch), **shapes}


def _with_bins(shape: Shape, bins: int) -> Shape:
    """(side, bins, n) with other bins."""
    return shape[0], bins, shape[2]
