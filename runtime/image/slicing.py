"""Slice planning: from an image's size to its grid, slice size and overview size.

Pure arithmetic on sizes, no pixels. All sizes are (width, height) in pixels and grids are
(columns, rows), as in the released code's `slice_logic.py`.
"""

import math
from dataclasses import dataclass

from uhd_export.runtime.errors import UhdError

SCALE_RESOLUTION = 336
PATCH = 14
MAX_SLICES = 9

Size = tuple[int, int]


@dataclass(frozen=True)
class SlicePlan:
    """How one image is cut. `slice_grid` is None where the overview alone is seen."""

    source_size: Size
    resized_size: Size
    slice_grid: tuple[int, int] | None
    slice_size: Size | None
    refined_size: Size | None
    overview_size: Size
    patch: int = PATCH

    @property
    def crop_sizes(self) -> list[Size]:
        """(width, height) of every crop: slices row by row, the overview last."""
        if self.slice_grid is None or self.slice_size is None:
            return [self.overview_size]
        return [self.slice_size] * (self.slice_grid[0] * self.slice_grid[1]) + [self.overview_size]

    @property
    def patch_grids(self) -> list[tuple[int, int]]:
        """(rows, columns) of patches of every crop, in the order of `crop_sizes`."""
        return [(h // self.patch, w // self.patch) for w, h in self.crop_sizes]


def plan_slices(
    size: Size,
    *,
    max_slices: int = MAX_SLICES,
    resize: int | None = None,
    upscale_only: bool = False,
    scale_resolution: int = SCALE_RESOLUTION,
    patch: int = PATCH,
) -> SlicePlan:
    """Plan the slices of an image of `size` (width, height).

    `resize` is the longest side before slicing (the evaluation loader's 1024 or 1536), None for
    none; with `upscale_only` (the first release) larger images keep their size. `max_slices=1`
    leaves the overview alone.

    Source: paper section 3.1 and `slice_image_minicpm` of the released code.
    Raises UhdError where a side would vanish.
    """
    width, height = size
    if width < 1 or height < 1:
        raise UhdError(f"image size {width}x{height}: both sides must be at least one pixel")
    if max_slices < 1:
        raise UhdError(f"max slices {max_slices}: must be at least 1 (1 means overview only)")
    if resize is not None:
        width, height = _fit_longest_side(size, resize, upscale_only)
    area = scale_resolution * scale_resolution
    multiple = min(math.ceil(width * height / area), max_slices)
    if multiple <= 1:
        overview = _fit_area((width, height), scale_resolution, patch, upscale=True)
        return SlicePlan(size, (width, height), None, None, None, overview, patch)
    grid = _best_grid(width, height, multiple, max_slices)
    cols, rows = grid
    cell = (max(width // cols, 1), max(height // rows, 1))
    slice_size = _fit_area(cell, scale_resolution, patch, upscale=True)
    overview = _fit_area((width, height), scale_resolution, patch, upscale=False)
    refined = (slice_size[0] * cols, slice_size[1] * rows)
    return SlicePlan(size, (width, height), grid, slice_size, refined, overview, patch)


def _fit_longest_side(size: Size, longest: int, upscale_only: bool) -> Size:
    """The evaluation loader's resize: longest side to `longest`, the other truncated.

    The quotient is rounded first, and a square image keeps its height: 685x685 at 1024 is 1023x1024.
    """
    width, height = size
    if longest < 1:
        raise UhdError(f"resize {longest}: the longest side must be at least one pixel")
    if width > height:
        new = (longest, int((longest / width) * height))
    else:
        new = (int((longest / height) * width), longest)
    if upscale_only and new[0] <= width:
        return size
    if min(new) < 1:
        raise UhdError(
            f"image size {width}x{height}: resized to a longest side of {longest} a side would "
            "vanish; use a larger --resize or none"
        )
    return new


def _fit_area(size: Size, scale: int, patch: int, *, upscale: bool) -> Size:
    """Fit the area of `size` to scale^2 keeping its ratio, floored to multiples of `patch`.

    Height is truncated first and width derived from it: the two are not symmetric.
    """
    width, height = size
    if width * height > scale * scale or upscale:
        ratio = width / height
        height = int(scale / math.sqrt(ratio))
        width = int(height * ratio)
    return max(width // patch * patch, patch), max(height // patch * patch, patch)


def _best_grid(width: int, height: int, multiple: int, max_slices: int) -> tuple[int, int]:
    """The factorisation whose ratio is nearest to the image's in log space; the first wins."""
    counts = [n for n in (multiple - 1, multiple, multiple + 1) if n != 1 and n <= max_slices]
    best, least = (1, 1), math.inf
    for count in counts:
        for cols in range(1, count + 1):
            if count % cols:
                continue
            error = abs(math.log(width / height) - math.log(cols / (count // cols)))
            if error < least:
                best, least = (cols, count // cols), error
    return best
