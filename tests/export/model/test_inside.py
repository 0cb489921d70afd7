"""Looking inside: the same pyramid and attention as the model computes with."""

import numpy as np
import pytest
import torch
from golden import recipe
from support.goldens import GOLDEN
from torch import nn

from uhd_export.model.inside import look_inside
from uhd_export.model.projector import QUERY_SETS
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.pixels import cut, normalise
from uhd_export.runtime.image.source import open_image


@pytest.fixture(scope="module")
def crops():
    def of(model):
        image = open_image(recipe.image(1008, 672, 0))
        return cut(image, model.plan(image))

    return of


def test_the_attention_is_what_torchs_own_module_weighs(golden_model, crops):
    model = golden_model()
    crop = crops(model)[0]
    inside, projector = look_inside(model, crop), model.projector
    rows, cols = (size // model.config.vision.patch for size in crop.shape[:2])
    assert inside.pyramid[4].shape[:2] == (4 * rows, 4 * cols)
    geometry = model.geometry(rows, cols)
    maps = {scale: torch.from_numpy(features)[None] for scale, features in inside.pyramid.items()}
    with torch.inference_mode():
        keys, values = projector.windows(maps, geometry)
        own = nn.MultiheadAttention(model.config.projector.hidden, projector.attn.heads, batch_first=True)
        own.load_state_dict(projector.attn.state_dict())
        for place, i in enumerate(QUERY_SETS):
            query = (projector.ln_q(getattr(projector, f"query_{i}")) + projector.pos_embed)[:, None]
            _, weights = own(query, keys[0], values[0], average_attn_weights=False)  # (N, heads, 1, K)
            levels = [inside.attention[scale][:, :, place] for scale in projector.levels]
            ours = np.concatenate([level.reshape(*weights.shape[:2], -1) for level in levels], -1)
            np.testing.assert_allclose(ours, weights[:, :, 0].numpy(), atol=2e-6)


def test_the_pyramid_leads_to_the_models_tokens(golden_model, crops):
    model = golden_model()
    crop = crops(model)[-1]  # the overview, whose grid is odd
    inside = look_inside(model, crop)
    maps = {scale: torch.from_numpy(features)[None] for scale, features in inside.pyramid.items()}
    pixels = torch.from_numpy(normalise(crop))[None]
    geometry = model.geometry(*(size // model.config.vision.patch for size in crop.shape[:2]))
    with torch.inference_mode():
        torch.testing.assert_close(model.projector.attend(maps, geometry), model.encode_crops(pixels))
    total = sum(part.sum((-2, -1)) for part in inside.attention.values())
    np.testing.assert_allclose(total, 1, atol=1e-5)


def test_the_v1_projector_has_no_inside(golden_model, crops):
    model = golden_model(config=GOLDEN / "configs" / "v1.json")
    with pytest.raises(UhdError, match="no pyramid to look into"):
        look_inside(model, crops(model)[0])
