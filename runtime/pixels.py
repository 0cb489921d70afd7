"""Pixels: open an image, cut it as planned, and normalise it as CLIP expects."""

import re
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from runtime.errors import UhdError
from runtime.slicing import Size, SlicePlan

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def open_image(image: str | Path | Image.Image | np.ndarray) -> Image.Image:
    """An RGB image from a path, a PIL image or a uint8 array of shape (h, w, 3).

    EXIF rotation is applied, alpha is composited on white, CMYK and palettes are converted.
    Raises UhdError where the file is missing or is no readable image.
    """
    if isinstance(image, np.ndarray):
        return Image.fromarray(image).convert("RGB")
    if isinstance(image, Image.Image):
        return _to_rgb(image)
    try:
        with warnings.catch_warnings():
            # 100-megapixel images are welcome here; Pillow's hard limit at twice its threshold stays.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(image) as opened:
                opened.load()
                return _to_rgb(opened)
    except FileNotFoundError:
        raise UhdError(f"image {image}: no such file") from None
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UhdError(f"image {image}: cannot be read ({error}); convert it to PNG or JPEG") from None


def source_size(source: str) -> Size:
    """(width, height) of `source`, a size like 1008x672 or the path of an image.

    Raises UhdError where it is neither.
    """
    size = re.fullmatch(r"(\d+)[xX×](\d+)", source)
    if size:
        return int(size[1]), int(size[2])
    if not Path(source).exists():
        raise UhdError(f"source {source!r}: neither a size like 1008x672 nor an image file")
    return open_image(source).size


def cut(image: Image.Image, plan: SlicePlan) -> list[np.ndarray]:
    """The crops of `plan` as uint8 arrays (h, w, 3): slices row by row, the overview last."""
    if plan.resized_size != image.size:
        image = image.resize(plan.resized_size, Image.Resampling.BICUBIC)
    crops = []
    if plan.grid is not None:
        refined = image.resize(plan.refined_size, Image.Resampling.BICUBIC)
        width, height = plan.slice_size
        for row in range(plan.grid[1]):
            for col in range(plan.grid[0]):
                left, top = col * width, row * height
                crops.append(refined.crop((left, top, left + width, top + height)))
    crops.append(image.resize(plan.overview_size, Image.Resampling.BICUBIC))
    return [np.asarray(crop) for crop in crops]


def normalise(crop: np.ndarray) -> np.ndarray:
    """uint8 (h, w, 3) to float32 (3, h, w) with CLIP's mean and standard deviation.

    The order of roundings is the released image processor's, so the result is equal bit for bit.
    """
    scaled = (crop * (1 / 255)).astype(np.float32)
    mean, std = np.array(CLIP_MEAN, np.float32), np.array(CLIP_STD, np.float32)
    return np.ascontiguousarray(((scaled - mean) / std).transpose(2, 0, 1))


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba)
    return image.convert("RGB")
