"""What a crop becomes inside the model, to look at: its feature pyramid and its windows' attention."""

from typing import NamedTuple

import numpy as np
import torch

from uhd_export.model.projector import HiwinProjector
from uhd_export.model.uhd import UhdModel
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.geometry import bin_grid
from uhd_export.runtime.image.pixels import normalise


class Inside(NamedTuple):
    """One crop's features and attention, float32, each by the level's scale (1, 2, 4, 8).

    `pyramid[s]` is (s * rows, s * cols, C) for a crop of rows x cols patches. `attention[s]` is (side, side,
    sets, heads, bins_y, bins_x): what each window's queries attend to among its bins of this level. The bins
    of all levels together sum to one (paper section 3.3).
    """

    pyramid: dict[int, np.ndarray]
    attention: dict[int, np.ndarray]


@torch.inference_mode()
def look_inside(model: UhdModel, crop: np.ndarray) -> Inside:
    """The pyramid and the attention of one uint8 (height, width, 3) crop, of those that `cut` makes.

    Raises UhdError where `model` is not a LLaVA-UHD v2: the v1 projector has no pyramid.
    """
    projector = model.projector
    if not isinstance(projector, HiwinProjector):
        raise UhdError("model: its projector is LLaVA-UHD v1's, which has no pyramid to look into")
    rows, cols = (size // model.config.vision.patch for size in crop.shape[:2])
    geometry, pixels = model.geometry(rows, cols), torch.from_numpy(normalise(crop))[None].to(model.dtype)
    maps = projector.pyramid(model.vision_tower(pixels, geometry), pixels, geometry)
    weights = projector.attention(maps, geometry)[0].float()
    grids = [bin_grid(rows, cols, scale, model.images.grid_mode) for scale in projector.levels]
    parts = weights.split([bins_y * bins_x for bins_y, bins_x in grids], -1)
    side = projector.side
    return Inside(
        {scale: maps[scale][0].float().numpy() for scale in projector.levels},
        {
            scale: part.unflatten(-1, grid).unflatten(0, (side, side)).numpy()
            for scale, grid, part in zip(projector.levels, grids, parts, strict=True)
        },
    )
