import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support.goldens import golden_json

from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.layout import Separators, indicator_tokens
from uhd_export.runtime.image.slicing import plan_slices

VARIANTS = {
    "none": {},
    "keep1024": {"resize": 1024},
    "keep1536": {"resize": 1536},
    "first1024_uponly": {"resize": 1024, "upscale_only": True},
}
sides = st.integers(1, 4000)


def golden_cases():
    for size, variants in golden_json("slicing").items():
        for variant, case in variants.items():
            yield pytest.param(tuple(map(int, size.split("x"))), variant, case, id=f"{size}-{variant}")


@pytest.mark.parametrize("size, variant, case", list(golden_cases()))
def test_golden_plans(size, variant, case):
    if "error" in case:
        with pytest.raises(UhdError, match="vanish"):
            plan_slices(size, **VARIANTS[variant])
        return
    for most in (9, 7, 6):
        plan = plan_slices(size, max_slices=most, **VARIANTS[variant])
        assert list(plan.resized_size) == case["size_in"]
        assert case[f"max{most}"] == {
            "source_size": list(plan.overview_size),
            "best_grid": plan.slice_grid and list(plan.slice_grid),
            "n_patches": len(plan.crop_sizes) - 1,
            "patch_size": plan.slice_size and list(plan.slice_size),
            "refine_size": plan.refined_size and list(plan.refined_size),
            "ind_tokens": indicator_tokens(plan.slice_grid, Separators()),
        }


def brute_force_grid(width, height, most):
    """The grid by exhaustive reading of the rule: every (columns, rows), the first nearest ratio."""
    multiple = min(math.ceil(width * height / 336**2), most)
    if multiple <= 1:
        return None
    grids = [
        (cols, rows)
        for count in (multiple - 1, multiple, multiple + 1)
        for cols in range(1, most + 1)
        for rows in range(1, most + 1)
        if cols * rows == count and count != 1 and count <= most
    ]
    return min(grids, key=lambda g: abs(math.log(width / height) - math.log(g[0] / g[1])))


def brute_force_fit(width, height):
    """Sides for an area of 336^2: height truncated, width from it, both down to whole patches."""
    ratio = width / height
    height = int(336 / math.sqrt(ratio))
    width = int(height * ratio)
    return max(14, width - width % 14), max(14, height - height % 14)


@given(sides, sides, st.integers(1, 9))
def test_plan_equals_the_rule_read_literally(width, height, most):
    plan = plan_slices((width, height), max_slices=most)
    grid = brute_force_grid(width, height, most)
    assert plan.slice_grid == grid
    if grid is None:
        assert plan.slice_size is None and plan.refined_size is None
        assert plan.overview_size == brute_force_fit(width, height)
        return
    cols, rows = grid
    refined = max(width - width % cols, cols), max(height - height % rows, rows)
    assert plan.slice_size == brute_force_fit(refined[0] / cols, refined[1] / rows)
    if width * height > 336**2:
        assert plan.overview_size == brute_force_fit(width, height)
    else:
        assert plan.overview_size == (max(14, width - width % 14), max(14, height - height % 14))


@given(sides, sides, st.integers(1, 9))
def test_crops_are_whole_patches_and_tile_the_refined_image(width, height, most):
    plan = plan_slices((width, height), max_slices=most)
    assert all(side % 14 == 0 and side > 0 for size in plan.crop_sizes for side in size)
    assert len(plan.crop_sizes) - 1 <= most
    assert [(h * 14, w * 14) for h, w in plan.patch_grids] == [(h, w) for w, h in plan.crop_sizes]
    if plan.slice_grid:
        assert plan.refined_size == tuple(
            s * n for s, n in zip(plan.slice_size, plan.slice_grid, strict=True)
        )


@given(sides, sides, st.sampled_from([336, 1024, 1536]))
def test_resizing_first_bounds_the_longest_side(width, height, longest):
    assume(int(min(width, height) * longest / max(width, height)) >= 1)
    always = plan_slices((width, height), resize=longest)
    assert max(always.resized_size) == longest
    upscaled = plan_slices((width, height), resize=longest, upscale_only=True)
    assert upscaled.resized_size in ((width, height), always.resized_size)
    if max(width, height) > longest:
        assert upscaled.resized_size == (width, height)


@pytest.mark.parametrize(
    "size, options, field",
    [
        ((0, 5), {}, "image size 0x5"),
        ((5, -1), {}, "image size 5x-1"),
        ((5, 5), {"max_slices": 0}, "max slices 0"),
        ((5, 5), {"resize": 0}, "resize 0"),
        ((5000, 1), {"resize": 1024}, "image size 5000x1"),
        ((1, 5000), {"resize": 1024}, "image size 1x5000"),
    ],
)
def test_impossible_sizes_are_named(size, options, field):
    with pytest.raises(UhdError, match=field):
        plan_slices(size, **options)


def test_the_resized_sizes_are_the_released_ones():
    squares = [plan_slices((n, n), resize=1024).resized_size for n in range(28, 4001)]
    assert all(height == 1024 for _, height in squares)
    assert sum(width == 1023 for width, _ in squares) == 483
    sizes = {(685, 685): (1023, 1024), (196, 147): (1024, 767), (147, 196): (767, 1024)}
    sizes |= {(400, 300): (1024, 768), (7664, 4311): (1024, 575), (1600, 900): (1024, 576)}
    for size, expected in sizes.items():
        assert plan_slices(size, resize=1024).resized_size == expected
