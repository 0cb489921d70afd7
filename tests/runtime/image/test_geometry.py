import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.goldens import assert_close, golden_json
from torch.nn import functional as F

from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.geometry import (
    BIN_CANDIDATES,
    RADIUS,
    adaptive_average,
    bicubic,
    bin_grid,
    crop_geometry,
    reflect_pad,
    roi_align,
)

sizes = st.integers(1, 70)


def separable(y, x, plane):
    return y @ plane @ x.T


def plane_of(rows, cols, seed):
    return np.random.default_rng(seed).standard_normal((rows, cols))


@given(sizes, sizes)
def test_rows_of_bicubic_and_adaptive_sum_to_one(out, size):
    assert_close(bicubic(out, size).sum(1), np.ones(out), 1e-12)
    assert_close(adaptive_average(out, size).sum(1), np.ones(out), 1e-12)


@given(sizes, sizes, sizes, sizes)
def test_bicubic_equals_interpolate(rows, cols, out_rows, out_cols):
    plane = plane_of(rows, cols, 1)
    expected = F.interpolate(
        torch.from_numpy(plane)[None, None], (out_rows, out_cols), mode="bicubic", align_corners=False
    )
    assert_close(separable(bicubic(out_rows, rows), bicubic(out_cols, cols), plane), expected[0, 0], 1e-9)


@given(sizes, sizes, sizes, sizes)
def test_adaptive_average_equals_pooling(rows, cols, out_rows, out_cols):
    plane = plane_of(rows, cols, 2)
    expected = F.adaptive_avg_pool2d(torch.from_numpy(plane)[None, None], (out_rows, out_cols))
    matrices = adaptive_average(out_rows, rows), adaptive_average(out_cols, cols)
    assert_close(separable(*matrices, plane), expected[0, 0], 1e-9)


@given(st.integers(RADIUS + 1, 40), st.integers(RADIUS + 1, 40))
def test_reflect_pad_equals_pad(rows, cols):
    plane = plane_of(rows, cols, 3)
    expected = F.pad(torch.from_numpy(plane)[None, None], [RADIUS] * 4, mode="reflect")[0, 0]
    matrices = reflect_pad(np.eye(rows), RADIUS), reflect_pad(np.eye(cols), RADIUS)
    assert_close(separable(*matrices, plane), expected, 0)


def bilinear(plane, y, x):
    """A sample of `plane`; zero beyond one pixel outside it, clamped within that pixel."""
    rows, cols = plane.shape
    if not (-1 <= y <= rows and -1 <= x <= cols):
        return 0.0
    y, x = min(max(y, 0), rows - 1), min(max(x, 0), cols - 1)
    y0, x0 = math.floor(y), math.floor(x)
    y1, x1 = min(y0 + 1, rows - 1), min(x0 + 1, cols - 1)
    top = plane[y0, x0] * (1 - (x - x0)) + plane[y0, x1] * (x - x0)
    bottom = plane[y1, x0] * (1 - (x - x0)) + plane[y1, x1] * (x - x0)
    return top * (1 - (y - y0)) + bottom * (y - y0)


def roi_align_loop(plane, boxes_y, boxes_x, bins_y, bins_x):
    """RoIAlign by its definition: the mean of bilinear samples on a regular grid in every bin."""

    def samples(low, high, bins):
        length = max(high - low, np.float32(1))
        count = math.ceil(length / np.float32(bins))
        step = float(length) / bins
        return [[float(low) + step * (b + (s + 0.5) / count) for s in range(count)] for b in range(bins)]

    out = []
    for low_y, high_y in boxes_y:
        for ys in samples(low_y, high_y, bins_y):
            out.append([])
            for low_x, high_x in boxes_x:
                for xs in samples(low_x, high_x, bins_x):
                    out[-1].append(np.mean([bilinear(plane, y, x) for y in ys for x in xs]))
    return np.array(out)


@settings(max_examples=40)
@given(
    st.integers(1, 60),
    st.integers(1, 60),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from(["exact", "bf16"]),
)
def test_roi_matrices_equal_the_definition(rows, cols, bins_y, bins_x, roi_rounding):
    plane = plane_of(rows, cols, 4)

    def windows(size):
        edges = torch.arange(13, dtype=torch.float32) * (size / 12)
        edges = edges.to(torch.bfloat16).float().numpy() if roi_rounding == "bf16" else edges.numpy()
        return list(itertools.pairwise(edges))

    expected = roi_align_loop(plane, windows(rows), windows(cols), bins_y, bins_x)
    actual = separable(
        roi_align(rows, bins_y, roi_rounding=roi_rounding),
        roi_align(cols, bins_x, roi_rounding=roi_rounding),
        plane,
    )
    assert_close(actual, expected, 1e-5)


def test_bin_grids_are_the_released_table():
    table = golden_json("bin_grids")
    for rows in range(1, 61):
        expected = table[str(rows)]
        actual = [bin_grid(rows, cols, 1, "selective") for cols in range(1, 61)]
        assert "".join(f"{y}{x}" for y, x in actual) == expected
    assert bin_grid(19, 29, 4, "selective") == (2, 3)
    assert bin_grid(1, 2142, 1, "selective") == (2, 4) and bin_grid(2142, 1, 1, "selective") == (4, 2)


def test_other_grid_modes():
    assert bin_grid(19, 29, 4, "fix") == (3, 3)
    assert [bin_grid(19, 29, s, "pyramid") for s in (1, 2, 4)] == [(2, 3), (4, 6), (8, 12)]
    assert (3, 3) in BIN_CANDIDATES
    with pytest.raises(UhdError, match="grid mode 'auto'"):
        bin_grid(19, 29, 1, "auto")


@settings(max_examples=25)
@given(st.integers(2, 60), st.integers(2, 60), st.sampled_from(["selective", "fix", "pyramid"]))
def test_crop_geometry_has_the_documented_shapes(rows, cols, grid_mode):
    geometry = crop_geometry(rows, cols, levels=(1, 2, 4), grid_mode=grid_mode)
    assert all(m.dtype == np.float32 for m in geometry.values())
    expected = {"position_y": (rows, 24), "position_x": (cols, 24)}
    for axis, n, which in (("y", rows, 0), ("x", cols, 1)):
        for s in (2, 4):
            expected[f"guidance_{s}x_{axis}"] = (s * n, 14 * n)
            expected[f"upsample_{s}x_{axis}"] = (s * n + 6, s * n // 2)
        for s in (1, 2, 4):
            bins = bin_grid(rows, cols, s, grid_mode)[which]
            expected[f"roi_{s}x_{axis}"] = (12, bins, s * n)
            expected[f"window_position_{s}x_{axis}"] = (12, bins, 12)
    assert {name: m.shape for name, m in geometry.items()} == expected


def test_crops_one_patch_high_are_refused_for_the_pyramid_only():
    with pytest.raises(UhdError, match="1x30 patches"):
        crop_geometry(1, 30)
    assert "roi_1x_y" in crop_geometry(1, 30, levels=(1,))
