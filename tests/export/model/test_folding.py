"""The folded projector is the released one: equal to float rounding at any crop shape."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uhd_export.model.folding import fold, folded_tokens


def relative_error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


def both(model, rows, cols, batch=1, seed=0):
    """Tokens by the released computation and by the folded weights, from random pixels."""
    pixels = torch.randn(batch, 3, rows * 14, cols * 14, generator=torch.Generator().manual_seed(seed))
    geometry = model.geometry(rows, cols)
    with torch.inference_mode():
        features = model.vision_tower(pixels, geometry)
        released = model.projector(features, pixels, geometry)
        single = len(model.config.projector.levels) == 1
        maps = (
            {1: features} if single else model.projector.upsampler.upsampler.raw(features, pixels, geometry)
        )
        return released, folded_tokens(fold(model.projector), maps, geometry)


@pytest.mark.parametrize("mask", [1, 3, 5, 7])
@pytest.mark.parametrize("grid_mode", ["selective", "fix", "pyramid"])
def test_folded_equals_released(golden_model, mask, grid_mode):
    released, folded = both(golden_model(mask=mask, grid_mode=grid_mode), 5, 7, batch=2)
    assert relative_error(folded, released) < 1e-5


@settings(max_examples=15)
@given(rows=st.integers(2, 14), cols=st.integers(2, 14), seed=st.integers(0, 99))
def test_folded_equals_released_at_any_shape(golden_model, rows, cols, seed):
    # Small sides put RoIAlign samples outside the map, where a pooled one is not one.
    released, folded = both(golden_model(), rows, cols, seed=seed)
    assert relative_error(folded, released) < 1e-5


def test_folding_uses_the_last_fixup(golden_model):
    """Dropping the JBU fix-up from the fold must be seen: it is the easiest part to lose."""
    model = golden_model()
    with torch.inference_mode():
        fixup = model.projector.upsampler.upsampler.fixup_proj[1].weight
        kept = fixup.clone()
        folded_before = fold(model.projector).levels[-1].norm_weight
        try:
            fixup.zero_()
            folded_after = fold(model.projector).levels[-1].norm_weight
        finally:
            fixup.copy_(kept)
    assert relative_error(folded_after, folded_before) > 1e-3
