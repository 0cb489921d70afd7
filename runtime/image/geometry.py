"""Geometry as data: the small matrices by which a crop's shape enters the vision graph.

Whatever depends on a crop's patch grid alone is linear and separable in rows and columns, so each
operation is a pair of matrices `y` (rows) and `x` (columns): `out = y @ map @ x.T`. They are
computed here in float64 and fed to the graph as float32.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uhd_export.runtime.choices import GRID_MODES
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.slicing import PATCH, SCALE_RESOLUTION

KERNEL = 7
# An overview of this ratio is two patches wide.
MOST_ELONGATED = (SCALE_RESOLUTION // (2 * PATCH)) ** 2
RADIUS = KERNEL // 2

# (columns, rows) of bins, in the order of the released code's list; the first of equals wins.
BIN_CANDIDATES = ((4, 2), (3, 2), (4, 3), (3, 3), (2, 4), (2, 3), (3, 4))


def bicubic(out: int, size: int) -> NDArray[Any]:
    """(out, size) matrix of bicubic resizing, align_corners=False, no antialias, a = -0.75."""
    a = -0.75
    centre = (np.arange(out) + 0.5) * size / out - 0.5
    base = np.floor(centre).astype(int)
    matrix = np.zeros((out, size))
    for tap in range(-1, 3):
        d = np.abs(centre - (base + tap))
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        np.add.at(matrix, (np.arange(out), np.clip(base + tap, 0, size - 1)), np.where(d <= 1, near, far))
    return matrix


def bilinear(out: int, size: int) -> NDArray[Any]:
    """(out, size) matrix of bilinear resizing, align_corners=False, no antialias."""
    centre = np.clip((np.arange(out) + 0.5) * size / out - 0.5, 0, size - 1)
    low = np.minimum(centre.astype(int), max(size - 2, 0))
    matrix = np.zeros((out, size))
    np.add.at(matrix, (np.arange(out), low), 1 - (centre - low))
    np.add.at(matrix, (np.arange(out), np.minimum(low + 1, size - 1)), centre - low)
    return matrix


def adaptive_average(out: int, size: int) -> NDArray[Any]:
    """(out, size) matrix of adaptive average pooling; bins overlap where size/out is fractional."""
    matrix = np.zeros((out, size))
    for i in range(out):
        start, end = i * size // out, -(-(i + 1) * size // out)
        matrix[i, start:end] = 1 / (end - start)
    return matrix


def reflect_pad(matrix: NDArray[Any], pad: int) -> NDArray[Any]:
    """Extend the output rows of `matrix` by reflection without repeating the border row."""
    return np.pad(matrix, ((pad, pad), (0, 0)), mode="reflect")


def roi_align(size: int, bins: int, windows: int = 12, *, roi_rounding: str = "exact") -> NDArray[Any]:
    """(windows * bins, size) matrix of RoIAlign over equal windows along one axis.

    torchvision's `roi_align` with aligned=False, adaptive sampling, a minimum roi size of 1 and
    clamping at the border; samples beyond the border count as zero. `roi_rounding="bf16"` rounds the box
    coordinates to bfloat16, as the released code does when it runs in that type.
    """
    edges = np.arange(windows + 1, dtype=np.float32) * np.float32(size / windows)
    if roi_rounding == "bf16":
        edges = _round_bf16(edges)
    edges = edges.astype(np.float64)
    matrix = np.zeros((windows * bins, size))
    for window in range(windows):
        start = edges[window]
        length = max(edges[window + 1] - start, 1.0)
        bin_length = length / bins
        samples = math.ceil(np.float32(length) / np.float32(bins))
        for b in range(bins):
            for s in range(samples):
                at = start + bin_length * (b + (s + 0.5) / samples)
                if at > size:
                    continue
                at = max(at, 0.0)
                low = min(int(at), size - 1)
                high = min(low + 1, size - 1)
                part = at - low if high > low else 0.0
                matrix[window * bins + b, low] += (1 - part) / samples
                matrix[window * bins + b, high] += part / samples
    return matrix


def bin_grid(rows: int, cols: int, scale: int, mode: str) -> tuple[int, int]:
    """(rows, columns) of bins in a window at level `scale` (1, 2, 4, 8) of a rows x cols crop.

    *selective* picks the ratio nearest to the crop's in log space and *fix* is 3x3 (paper section
    3.3); *pyramid* keeps the pixel density of each level: 2x3, 4x6, 8x12, 16x24.
    """
    if mode == "fix":
        return 3, 3
    if mode == "pyramid":
        return 2 * scale, 3 * scale
    if mode != "selective":
        raise UhdError(f"grid mode {mode!r}: must be one of {', '.join(GRID_MODES)}")
    ratio = math.log(cols / rows)
    best, least = (3, 3), math.inf
    for bins_w, bins_h in BIN_CANDIDATES:
        error = abs(ratio - math.log(bins_w / bins_h))
        if error < least:
            best, least = (bins_h, bins_w), error
    return best


def check_crop(rows: int, cols: int, levels: Sequence[int]) -> None:
    """Raise UhdError where the feature pyramid, of more than one of `levels`, has no geometry for a crop."""
    if len(levels) > 1 and min(rows, cols) < 2:
        raise UhdError(
            f"crop of {rows}x{cols} patches: the feature pyramid needs at least 2 on each side; use an image "
            f"that is less elongated, at most {MOST_ELONGATED} times as long as it is wide"
        )


def crop_geometry(
    rows: int,
    cols: int,
    *,
    levels: Sequence[int] = (1, 2, 4),
    grid_mode: str = "selective",
    side: int = 12,
    table: int = 24,
    patch: int = 14,
    roi_rounding: str = "exact",
    pyramid: str = "jbu",
) -> dict[str, NDArray[Any]]:
    """All float32 matrices for a crop of rows x cols patches, by the graph's input names.

    `levels` are the scales in use, `side` the windows along an axis, `table` the side of the ViT's
    position table. Names end in `_y` or `_x`:

    - `position` (rows, table): position-table interpolation;
    - `guidance_Sx` (S*rows, patch*rows): pooling of the image to the output size of stage S;
    - `upsample_Sx` (S*rows + 6, S*rows/2): bicubic doubling with the reflect padding of 3; in a bilinear
      pyramid (S*rows, rows): bilinear resizing of the first level;
    - `roi_Sx` (side, bins, S*rows): RoIAlign of level S;
    - `window_position_Sx` (side, bins, side): the key position table, resized and pooled.

    Raises UhdError for grids one patch high or wide, where reflect padding is undefined.
    """
    if pyramid == "jbu":
        check_crop(rows, cols, levels)
    geometry: dict[str, NDArray[Any]] = {}
    for axis, n, which in (("y", rows, 0), ("x", cols, 1)):
        geometry[f"position_{axis}"] = bicubic(n, table) if n != table else np.eye(n)
        scale = 2
        while pyramid == "jbu" and scale <= max(levels):
            geometry[f"guidance_{scale}x_{axis}"] = adaptive_average(n * scale, n * patch)
            up = bicubic(n * scale, n * scale // 2)
            geometry[f"upsample_{scale}x_{axis}"] = reflect_pad(up, RADIUS)
            scale *= 2
        if pyramid == "bilinear":
            for scale in (scale for scale in levels if scale > 1):
                geometry[f"upsample_{scale}x_{axis}"] = bilinear(n * scale, n)
        for scale in levels:
            bins = bin_grid(rows, cols, scale, grid_mode)[which]
            roi = roi_align(n * scale, bins, side, roi_rounding=roi_rounding)
            keys = roi @ (bicubic(n * scale, side) if n * scale != side else np.eye(side))
            geometry[f"roi_{scale}x_{axis}"] = roi.reshape(side, bins, n * scale)
            geometry[f"window_position_{scale}x_{axis}"] = keys.reshape(side, bins, side)
    return {name: np.ascontiguousarray(m, np.float32) for name, m in geometry.items()}


def _round_bf16(values: NDArray[Any]) -> NDArray[Any]:
    """Round float32 to the nearest bfloat16, ties to even, keeping the float32 type."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.astype(np.uint32).view(np.float32)
