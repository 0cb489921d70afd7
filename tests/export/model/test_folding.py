"""The folded projector is the released one: equal to float rounding at any crop shape."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uhd_export.model import folding
from uhd_export.model.folding import fold, folded_tokens, pixel_scale
from uhd_export.model.projector import LN_EPS, HiwinProjector
from uhd_export.runtime.config import ProjectorConfig


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


@pytest.mark.parametrize(("channels", "hidden"), [(64, 256), (256, 128)])
def test_norm_factor_has_a_row_a_channel(channels, hidden):
    """Below is a row that is zero but for the bias: its square is a constant. Where D < C there is none."""
    config = ProjectorConfig("hiwin", hidden, channels, (1, 2, 4), 12)
    projector, generator = HiwinProjector(config), torch.Generator().manual_seed(0)
    for parameter in projector.parameters():
        parameter.data.normal_(std=0.2, generator=generator)
    wide = {name: p.detach().double() for name, p in projector.named_parameters()}
    x = torch.randn(50, channels, generator=generator).double()
    for scale, level in zip(config.levels, fold(projector).levels, strict=True):
        centred = folding._centred(projector, wide, scale)
        factor = torch.linalg.qr(centred, mode="r").R
        rows = min(hidden, channels)
        assert level.norm_weight.shape == (channels, rows)
        assert factor.shape[0] == min(hidden, channels + 1) and not factor[channels:, :channels].any()
        whole = (torch.cat([x, torch.ones(50, 1).double()], 1) @ factor.T).square().sum(1)
        kept = (x @ factor[:rows, :-1].T + factor[:rows, -1]).square().sum(1)
        constant = float(factor[channels:, -1].square().sum())
        assert (constant > 0) == (hidden > channels) and level.norm_rest == constant
        torch.testing.assert_close(kept + constant, whole, rtol=1e-14, atol=0)
        # And it is the norm's variance, to the rounding of the weights.
        variance = (torch.cat([x, torch.ones(50, 1).double()], 1) @ centred.T).square().mean(1)
        expected = (variance + LN_EPS).rsqrt()
        torch.testing.assert_close(
            pixel_scale(x.float(), level, hidden).double(), expected, rtol=1e-5, atol=0
        )
