"""Where an image comes from: a path, bytes, a data URI, an address, an open file, or pixels in memory."""

import io
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.data_uri import data_uri
from uhd_export.runtime.image.decode import (
    MAX_BYTES,
    decode,
    from_array,
    from_tensor,
    header,
    plain_file,
    reading,
    size_of,
    to_rgb,
)
from uhd_export.runtime.image.slicing import Size

Bytes = bytes | bytearray | memoryview
ImageLike = str | Path | Bytes | BinaryIO | Image.Image | NDArray[Any]
"""What is taken for an image, see `open_image`; a tensor of torch too."""
Images = ImageLike | Iterable[ImageLike]
"""One image, or a list or tuple of them."""
_ADDRESS = re.compile(r"https?://", re.IGNORECASE)
_EXPECTED = "a path, an http(s) address, a data URI, bytes, an open file, a PIL image, an array or a tensor"


def as_images(images: Images) -> list[ImageLike]:
    """A list of images from one or several."""
    one = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image, np.ndarray, Mapping)
    if isinstance(images, one) or hasattr(images, "read") or _is_tensor(images):
        return [images]  # type: ignore[list-item]
    try:
        return list(images)
    except TypeError:  # `open_image` tells what is expected
        return [images]  # type: ignore[list-item]


def open_image(image: ImageLike) -> Image.Image:
    """An RGB image from what is taken for one.

    That is a path; a text that begins with `http://`, `https://` or `data:`; the bytes of a file, or a file
    opened for reading bytes; a PIL image; a uint8 array (h, w), (h, w, 3) or (h, w, 4); a uint8 tensor of
    torch, (h, w) or channels first. EXIF rotation is applied, alpha is composited on white, 16 bits become 8,
    CMYK and palettes are converted. Raises UhdError where it is none, cannot be read, or holds what has no
    meaning as 8 bits.
    """
    if isinstance(image, np.ndarray):
        return in_memory(from_array(image), "image array")
    if isinstance(image, Image.Image):
        return in_memory(image, str(image.info.get("source", "image")))
    if _is_tensor(image):
        return in_memory(from_tensor(image), "image tensor")
    if isinstance(image, (bytes, bytearray, memoryview)):
        return from_bytes(image)
    if isinstance(image, str) and image[:5].lower() == "data:":
        return from_bytes(data_uri(image, MAX_BYTES), "image of a data URI")
    if isinstance(image, str) and _ADDRESS.match(image):
        from uhd_export.runtime.image.fetch import fetch_now

        return from_bytes(fetch_now(image), f"image {image}")
    if isinstance(image, (str, os.PathLike)):
        name = f"image {image}"
        with reading(name), plain_file(image) as file:
            return decode(file, name)
    if hasattr(image, "read"):
        return from_bytes(_read(image))
    raise UhdError(f"image: {type(image).__name__} is not supported; give {_EXPECTED}")


def in_memory(image: Image.Image, name: str) -> Image.Image:
    """A PIL image as RGB. Raises UhdError."""
    with reading(name):
        return to_rgb(image, name)


def from_bytes(
    data: Bytes, name: str = "image", *, formats: tuple[str, ...] | None = None, max_pixels: int | None = None
) -> Image.Image:
    """The RGB image in the bytes of a file. Raises UhdError.

    Pillow tries `formats`, or all it has; one of more than `max_pixels` is refused before they are made.
    """
    with reading(name):
        if max_pixels is not None:
            width, height = _stored_size(data, formats)
            if width * height > max_pixels:
                raise UhdError(f"{name}: more than {max_pixels / 1e6:.0f} megapixels; send it smaller")
        return decode(io.BytesIO(data), name, formats)


def _stored_size(data: Bytes, formats: tuple[str, ...] | None) -> Size:
    try:
        with header(io.BytesIO(data), formats) as opened:
            return opened.size
    except Image.DecompressionBombError:  # Pillow's own limit, which comes first
        return 1 << 31, 1 << 31


def source_size(source: str) -> Size:
    """(width, height) of `source`, a size like 1008x672 or the path of an image.

    Raises UhdError where it is neither.
    """
    size = re.fullmatch(r"(\d{1,9})[xX×](\d{1,9})", source)
    if size:
        return int(size[1]), int(size[2])
    if not os.path.exists(source):
        raise UhdError(f"source {source!r}: neither a size like 1008x672 nor an image file")
    with reading(f"image {source}"), plain_file(source) as file:
        return size_of(file)


def _is_tensor(image: object) -> bool:
    """Whether it is a tensor of torch, which is not imported for that."""
    return any(f"{kind.__module__}.{kind.__name__}" == "torch.Tensor" for kind in type(image).__mro__)


def _read(file: Any) -> bytes:
    """All that is left in an open file. Raises UhdError."""
    try:
        data = file.read(MAX_BYTES + 1)
    except Exception as error:
        raise UhdError(f"image: the open file cannot be read ({error}); open it again, as bytes") from None
    if not isinstance(data, (bytes, bytearray)):
        raise UhdError("image: the open file gives text; open it with mode 'rb'")
    if len(data) > MAX_BYTES:
        raise UhdError(f"image: more than {MAX_BYTES >> 20} MiB; give a smaller one")
    return bytes(data)
