"""Pixels: an RGB image cut as planned, and normalised as CLIP expects."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from PIL import Image

from uhd_export.runtime.image.slicing import SlicePlan

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def cut(image: Image.Image, plan: SlicePlan) -> list[NDArray[Any]]:
    """The crops of `plan` as uint8 arrays (h, w, 3): slices row by row, the overview last."""
    if plan.resized_size != image.size:
        image = image.resize(plan.resized_size, Image.Resampling.BICUBIC)
    crops = []
    if plan.slice_grid is not None and plan.slice_size is not None and plan.refined_size is not None:
        refined = image.resize(plan.refined_size, Image.Resampling.BICUBIC)
        width, height = plan.slice_size
        for row in range(plan.slice_grid[1]):
            for col in range(plan.slice_grid[0]):
                left, top = col * width, row * height
                crops.append(refined.crop((left, top, left + width, top + height)))
    crops.append(image.resize(plan.overview_size, Image.Resampling.BICUBIC))
    return [np.asarray(crop) for crop in crops]


@functools.cache
def _levels(dtype: np.dtype[Any]) -> NDArray[Any]:
    """(3, 256) of `dtype`: what each of the 256 values of a channel becomes, with CLIP's mean and deviation.

    The order of roundings is the released image processor's, so the result is equal bit for bit.
    """
    scaled = (np.arange(256) * (1 / 255)).astype(np.float32)[:, None]
    mean, std = np.array(CLIP_MEAN, np.float32), np.array(CLIP_STD, np.float32)
    return np.ascontiguousarray(((scaled - mean) / std).T.astype(dtype))


def normalise(crop: NDArray[Any]) -> NDArray[Any]:
    """uint8 (h, w, 3) to float32 (3, h, w) with CLIP's mean and standard deviation."""
    one: NDArray[Any] = normalise_batch([crop])[0]
    return one


def normalise_batch(
    crops: Sequence[NDArray[Any]],
    dtype: DTypeLike = np.float32,
    empty: Callable[[Sequence[int], np.dtype[Any]], NDArray[Any]] = np.empty,
) -> NDArray[Any]:
    """Equal uint8 crops, (h, w, 3) each, to (B, 3, h, w) of `dtype` as CLIP expects them.

    `empty` makes the array that is filled, of a shape and a type.
    """
    levels = _levels(np.dtype(dtype))
    out = empty((len(crops), 3, *crops[0].shape[:2]), np.dtype(dtype))
    for crop, planes in zip(crops, out, strict=True):
        for channel, plane in enumerate(planes):
            # Any mode but raise writes into `out` at once; no value of 8 bits is outside of the table.
            np.take(levels[channel], crop[:, :, channel], out=plane, mode="clip")
    return out
