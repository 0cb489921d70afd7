import numpy as np
import pytest
import torch
from golden import recipe
from support.goldens import GOLDEN, TOLERANCE, assert_close, golden_tensors

from uhd_export.model.projector import HiwinProjector
from uhd_export.runtime.config import ProjectorConfig
from uhd_export.runtime.image.geometry import crop_geometry
from uhd_export.runtime.image.pixels import cut, normalise
from uhd_export.runtime.image.source import open_image

IMAGES = {"main": (1008, 672, 0), "wide": (500, 120, 5)}
WINDOWS = [0, 1, 77, 143]


def pixels_of(model, case, crops):
    """Normalised pixels of the crops at those indices, which must be of one size."""
    image = open_image(recipe.image(*IMAGES[case]))
    cuts = cut(image, model.plan(image))
    return torch.stack([torch.from_numpy(normalise(cuts[index])) for index in crops])


def tokens_close(model, name, step=1):
    """Compare the crops that are stored for run `name`, every `step`th channel."""
    stored = {k: v for k, v in golden_tensors("projector").items() if k.startswith(f"{name}/")}
    for case, crops in (("main", (0, 5)), ("main", (6,)), ("wide", (0,))):
        crops = [crop for crop in crops if f"{name}/{case}/{crop}" in stored]
        if crops:
            tokens = model.encode_crops(pixels_of(model, case, crops))[..., ::step]
            assert_close(tokens, np.stack([stored[f"{name}/{case}/{crop}"] for crop in crops]))


def test_hiwin_tokens_of_three_levels(golden_model):
    tokens_close(golden_model(), "mask7")


def test_hiwin_tokens_of_two_levels(golden_model):
    tokens_close(golden_model(mask=3), "mask3", step=4)


def test_v1_tokens(golden_model):
    tokens_close(golden_model(config=GOLDEN / "configs" / "v1.json"), "v1", step=4)


def test_bf16_boxes_are_the_released_rounding(golden_model):
    tokens_close(golden_model(roi_rounding="bf16"), "mask7_bf16_boxes")


def test_exact_boxes_differ_from_rounded_ones_on_odd_grids(golden_model):
    model = golden_model()
    overview = model.encode_crops(pixels_of(model, "main", [6]))[0]
    rounded = golden_tensors("projector")["mask7_bf16_boxes/main/6"]
    assert np.abs(overview.numpy() - rounded).max() > 100 * TOLERANCE


def windows_of(model, which):
    """Keys and values of the first and last slice, or of the overview, of the main image."""
    pixels = pixels_of(model, "main", [0, 5] if which == "slices" else [6])
    geometry = model.geometry(pixels.shape[2] // 14, pixels.shape[3] // 14)
    with torch.inference_mode():
        features = model.vision_tower(pixels, geometry)
        return model.projector.windows(model.projector.pyramid(features, pixels, geometry), geometry)


@pytest.mark.parametrize(
    "which, roi_rounding",
    [("slices", "exact"), ("overview", "exact"), ("slices", "bf16"), ("overview", "bf16")],
)
def test_keys_and_values_of_the_windows(golden_model, which, roi_rounding):
    run = "mask7_bf16_boxes" if (which, roi_rounding) == ("overview", "bf16") else "mask7"
    for kind, rows in zip(
        ("keys", "values"), windows_of(golden_model(roi_rounding=roi_rounding), which), strict=True
    ):
        rows = torch.cat([rows[0, WINDOWS], rows[-1, -1:]])
        assert_close(rows, golden_tensors("projector")[f"{run}/{which}/{kind}"])


@pytest.mark.parametrize("grid_mode, keys", [("selective", 18), ("fix", 27), ("pyramid", 126)])
def test_keys_a_window_in_each_grid_mode(golden_model, grid_mode, keys):
    rows, _ = windows_of(golden_model(grid_mode=grid_mode), "overview")
    assert rows.shape == (1, 144, keys, 256)


def projector_of(levels):
    """A projector with weights of the recipe, for masks that no golden run has."""
    module = HiwinProjector(ProjectorConfig("hiwin", 256, 64, levels, 12))
    for name, parameter in module.named_parameters():
        value = recipe.weight(f"model.mm_projector.{name}", tuple(parameter.shape))
        parameter.data.copy_(torch.from_numpy(value.reshape(parameter.shape)))
    return module.requires_grad_(False)


def synthetic_crop(rows, cols):
    features = torch.from_numpy(recipe.normal(7, (1, rows, cols, 64)))
    image = torch.from_numpy(normalise(recipe.image(14 * cols, 14 * rows, 3)))[None]
    geometry = crop_geometry(rows, cols, levels=(1, 2, 4, 8))
    return features, image, {name: torch.from_numpy(m) for name, m in geometry.items()}


def test_mask_5_is_mask_7_without_its_middle_level():
    features, image, geometry = synthetic_crop(9, 14)
    parts = {}
    for levels in ((1, 2, 4), (1, 4)):
        projector = projector_of(levels)
        parts[levels] = projector.windows(projector.pyramid(features, image, geometry), geometry)
    bins = parts[1, 2, 4][0].shape[2] // 3
    for three, two in zip(parts[1, 2, 4], parts[1, 4], strict=True):
        assert_close(torch.cat([three[:, :, :bins], three[:, :, 2 * bins :]], 2), two, 1e-5)


def test_mask_15_adds_a_level_and_moves_the_fixup_to_it():
    features, image, geometry = synthetic_crop(6, 5)
    keys = {}
    for levels in ((1, 2, 4), (1, 2, 4, 8)):
        projector = projector_of(levels)
        keys[levels] = projector.windows(projector.pyramid(features, image, geometry), geometry)[0]
        assert projector(features, image, geometry).shape == (1, 144, 256)
    bins = keys[1, 2, 4].shape[2] // 3
    assert keys[1, 2, 4, 8].shape[2] == 4 * bins
    assert_close(keys[1, 2, 4, 8][:, :, : 2 * bins], keys[1, 2, 4][:, :, : 2 * bins], 1e-5)
    third = slice(2 * bins, 3 * bins)
    assert not torch.allclose(keys[1, 2, 4, 8][:, :, third], keys[1, 2, 4][:, :, third], atol=1e-3)


def test_mask_1_uses_no_image():
    features, image, geometry = synthetic_crop(6, 5)
    projector = projector_of((1,))
    assert torch.equal(projector(features, image, geometry), projector(features, -image, geometry))
