"""Pixels: open an image, cut it as planned, and normalise it as CLIP expects."""

import functools
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.slicing import Size, SlicePlan

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# EXIF orientations that swap width and height.
_QUARTER_TURNS = (5, 6, 7, 8)


ImageLike = str | Path | Image.Image | NDArray[Any]
"""What is taken for an image: a path, a PIL image or an array, see `open_image`."""
Images = ImageLike | Sequence[ImageLike]
"""One image, or a list or tuple of them."""


def as_images(images: Images) -> list[ImageLike]:
    """A list of images from one or several."""
    return [images] if isinstance(images, (str, Path, Image.Image, np.ndarray)) else list(images)


def open_image(image: ImageLike) -> Image.Image:
    """An RGB image from a path, a PIL image or a uint8 array (h, w), (h, w, 3) or (h, w, 4).

    EXIF rotation is applied, alpha is composited on white, 16 bits become 8, CMYK and palettes are
    converted. Raises UhdError where the file is missing, is no readable image, or holds what has no
    meaning as 8 bits.
    """
    if isinstance(image, np.ndarray):
        return _to_rgb(_from_array(image), "image array")
    if isinstance(image, Image.Image):
        return _to_rgb(image, "image")
    if not isinstance(image, (str, Path)):
        raise UhdError(
            f"image: {type(image).__name__} is not supported; give a path, a PIL image or an array"
        )
    with _opened(image) as opened:
        return _to_rgb(opened, f"image {image}")


def source_size(source: str) -> Size:
    """(width, height) of `source`, a size like 1008x672 or the path of an image.

    Pixels are decoded only in a PNG, where EXIF may follow them. Raises UhdError where it is neither.
    """
    size = re.fullmatch(r"(\d+)[xX×](\d+)", source)
    if size:
        return int(size[1]), int(size[2])
    if not Path(source).exists():
        raise UhdError(f"source {source!r}: neither a size like 1008x672 nor an image file")
    with _opened(source) as opened:
        width, height = opened.size
        turned = opened.getexif().get(ExifTags.Base.Orientation) in _QUARTER_TURNS
    return (height, width) if turned else (width, height)


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


def normalise_batch(crops: Sequence[NDArray[Any]], dtype: DTypeLike = np.float32) -> NDArray[Any]:
    """Equal uint8 crops, (h, w, 3) each, to (B, 3, h, w) of `dtype` as CLIP expects them."""
    levels = _levels(np.dtype(dtype))
    out = np.empty((len(crops), 3, *crops[0].shape[:2]), dtype)
    for crop, planes in zip(crops, out, strict=True):
        for channel, plane in enumerate(planes):
            # Any mode but raise writes into `out` at once; no value of 8 bits is outside of the table.
            np.take(levels[channel], crop[:, :, channel], out=plane, mode="clip")
    return out


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """The image file at `path`; what goes wrong while it is read becomes a UhdError."""
    try:
        with warnings.catch_warnings():
            # 100-megapixel images are welcome here; Pillow's hard limit at twice its threshold stays.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                yield opened
    except FileNotFoundError:
        raise UhdError(f"image {path}: no such file") from None
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UhdError(f"image {path}: cannot be read ({error}); convert it to PNG or JPEG") from None


def _from_array(array: NDArray[Any]) -> Image.Image:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise UhdError(
            f"image array: {array.dtype} of shape {array.shape}; "
            "expected uint8 of shape (h, w), (h, w, 3) or (h, w, 4)"
        )
    return Image.fromarray(array)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = _to_8_bits(image, name)
    elif image.mode == "F":
        raise UhdError(f"{name}: floating-point pixels have no range of their own; scale them to 8 bits")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba)
    return image if image.mode == "RGB" else image.convert("RGB")  # a copy already


def _to_8_bits(image: Image.Image, name: str) -> Image.Image:
    """Grey of 16 bits as L, or LA where one value is transparent; Pillow's own `convert` clips at 255.

    The high byte is taken, as Pillow does for 16-bit colour. Mode I says nothing of its range: values that
    fit 8 bits are taken to be 8 bits.
    """
    values = np.asarray(image)
    if image.mode == "I" and not 0 <= values.min() <= values.max() < 2**16:
        raise UhdError(f"{name}: values from {values.min()} to {values.max()}; scale them to 8 bits")
    shift = 0 if image.mode == "I" and values.max() < 2**8 else 8
    grey = Image.fromarray((values >> shift).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray((values != image.info["transparency"]).astype(np.uint8) * 255))
    return grey
