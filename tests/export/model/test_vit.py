import pytest
import torch
from golden import recipe
from support.goldens import assert_close, golden_tensors

from uhd_export.checkpoint.config import read_config
from uhd_export.checkpoint.options import SourceOptions
from uhd_export.checkpoint.reader import VISION_PREFIX, Checkpoint
from uhd_export.model.vit import VisionTower
from uhd_export.runtime.image.geometry import crop_geometry
from uhd_export.runtime.image.pixels import normalise

CROPS = [((24, 24), 1), ((19, 29), 2), ((29, 19), 3), ((17, 33), 4)]


@pytest.fixture(scope="module")
def tower(golden_checkpoint):
    config = read_config(golden_checkpoint, SourceOptions(vision_tower=golden_checkpoint / "clip")).vision
    with torch.device("meta"):
        tower = VisionTower(config)
    Checkpoint(golden_checkpoint).load_into(tower, VISION_PREFIX, torch.float32)
    return tower


def crop(rows, cols, seed):
    pixels = torch.from_numpy(normalise(recipe.image(14 * cols, 14 * rows, seed)))[None]
    geometry = {k: torch.from_numpy(v) for k, v in crop_geometry(rows, cols).items()}
    return pixels, geometry


@pytest.mark.parametrize("grid, seed", CROPS)
def test_features_equal_the_released_tower(tower, grid, seed):
    # The released code ran the four crops in one padded batch; here each runs alone.
    features = tower(*crop(*grid, seed))
    assert features.shape == (1, *grid, 64)
    assert_close(features[0].flatten(0, 1), golden_tensors("vision")["features_{}x{}".format(*grid)])


def test_embedding_of_an_odd_grid_equals_the_released_one(tower):
    embedded = tower.pre_layrnorm(tower.embeddings(*crop(19, 29, 2)))[0]
    assert_close(embedded[::4], golden_tensors("vision")["embedded_19x29"])


def test_equal_crops_run_as_a_batch(tower):
    pixels, geometry = crop(19, 29, 2)
    other = pixels.flip(-1)
    batch = tower(torch.cat([pixels, other]), geometry)
    assert_close(batch[0], tower(pixels, geometry)[0], 1e-5)
    assert_close(batch[1], tower(other, geometry)[0], 1e-5)
