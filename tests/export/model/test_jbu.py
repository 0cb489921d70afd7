import pytest
import torch
from golden import recipe
from support.goldens import assert_close, golden_tensors

from uhd_export.model.jbu import JbuStack
from uhd_export.plugins.jbu.reference import FIXUP, spatial_kernel
from uhd_export.runtime.image.geometry import crop_geometry
from uhd_export.runtime.image.pixels import normalise

PREFIX = "model.mm_projector.upsampler.upsampler."
CHANNELS = 64


def golden(name):
    """(channels, H, W) as stored, every 4th channel, to (H, W, channels)."""
    return golden_tensors("jbu")[name].transpose(1, 2, 0)


def stack(*scales) -> JbuStack:
    """A stack with the golden weights; those of `up3` follow the recipe like any other."""
    module = JbuStack(CHANNELS, scales)
    for name, parameter in module.named_parameters():
        value = torch.from_numpy(
            recipe.weight(PREFIX + name, tuple(parameter.shape)).reshape(parameter.shape)
        )
        parameter.data.copy_(value)
    return module.requires_grad_(False)


def inputs(rows, cols):
    source = torch.from_numpy(recipe.normal(1000, (1, CHANNELS, rows, cols))).permute(0, 2, 3, 1)
    image = torch.from_numpy(normalise(recipe.image(14 * cols, 14 * rows, 20)))[None]
    geometry = crop_geometry(rows, cols, levels=(1, 2, 4, 8))
    return source, image, {name: torch.from_numpy(m) for name, m in geometry.items()}


def test_two_times_stack_is_fixed_up():
    maps = stack(2)(*inputs(19, 29))
    assert_close(maps[2][0, ..., ::4], golden("stack2/2x"))


def test_four_times_stack_has_a_raw_middle():
    maps = stack(2, 4)(*inputs(19, 29))
    assert_close(maps[2][0, ..., ::4], golden("stack4/2x"))
    assert_close(maps[4][0, ..., :32:4], golden("stack4/4x"))


def test_eight_times_stages_equal_the_training_forward():
    # There each scale has its own 1x1 fix-up, and the next stage starts from the fixed-up map.
    source, image, geometry = inputs(5, 7)
    stages = stack(2, 4, 8)
    for number, scale in enumerate((2, 4, 8), 1):
        source = getattr(stages, f"up{number}")(source, image, scale, geometry)
        weight = recipe.weight(f"{PREFIX}fixup_proj_{scale}x.1.weight", (CHANNELS, CHANNELS, 1, 1))
        bias = recipe.weight(f"{PREFIX}fixup_proj_{scale}x.1.bias", (CHANNELS,))
        fixup = torch.nn.functional.linear(
            source, torch.from_numpy(weight).flatten(1), torch.from_numpy(bias)
        )
        source = source + FIXUP * fixup
        assert_close(source[0, ..., : 32 if scale == 8 else 64 : 4], golden(f"staged8/{scale}x"))


def test_only_the_last_scale_is_fixed_up():
    source, image, geometry = inputs(5, 7)
    stages = stack(2, 4, 8)
    raw, maps = stages.raw(source, image, geometry), stages(source, image, geometry)
    assert sorted(maps) == [1, 2, 4, 8]
    for scale in (1, 2, 4):
        assert torch.equal(raw[scale], maps[scale])
    assert not torch.equal(raw[8], maps[8])
    assert [tuple(maps[s].shape[1:3]) for s in (1, 2, 4, 8)] == [(5 * s, 7 * s) for s in (1, 2, 4, 8)]


def test_a_constant_map_without_corrections_stays_constant():
    # The bilateral weights of a pixel sum to one before the learned correction.
    source, image, geometry = inputs(6, 5)
    stages = stack(2)
    stages.up1.fixup_proj[3].weight.zero_()
    stages.up1.fixup_proj[3].bias.zero_()
    out = stages.raw(torch.full_like(source, 3.0), image, geometry)[2]
    assert_close(out, torch.full_like(out, 3.0), 1e-5)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_spatial_kernel_is_a_gaussian_of_the_distance(sigma):
    kernel = spatial_kernel(torch.tensor(sigma)).unflatten(0, (7, 7))
    for dy in range(7):
        for dx in range(7):
            square = ((dy - 3) / 3) ** 2 + ((dx - 3) / 3) ** 2
            assert kernel[dy, dx].item() == pytest.approx(2.718281828 ** (-square / (2 * sigma**2)), abs=1e-6)
