"""From an image as it is stored to RGB of 8 bits: the pixels count, whatever the metadata beside them."""

import io
import logging
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from uhd_export.runtime.errors import UhdError, is_out_of_memory

MAX_BYTES = 256 << 20
"""The largest image that is read from anything but a file."""
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_QUARTER_TURNS = (5, 6, 7, 8)
_PNG = b"\x89PNG\r\n\x1a\n"
# What makes up a PNG's pixels; everything else may be left out.
_PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf", b"acTL", b"fcTL", b"fdAT"}
# 16-bit pixels that are all below this are of another range, such as 12 bits: their high bytes are black.
_DARK = 1 << 12

logging.getLogger("PIL").addHandler(logging.NullHandler())  # what fails is raised; else it goes to stderr


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Whatever Pillow raises while `name` is read becomes a UhdError that says so."""
    try:
        with warnings.catch_warnings():
            # 100-megapixel images are welcome here; Pillow's hard limit at twice its threshold stays.
            warnings.simplefilter("ignore")
            yield
    except UhdError:
        raise
    except FileNotFoundError:
        raise UhdError(f"{name}: no such file") from None
    except UnidentifiedImageError:
        raise UhdError(f"{name}: no image of a known format; convert it to PNG or JPEG") from None
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise UhdError(f"{name}: more than {most:.0f} megapixels; make it smaller") from None
    except Exception as error:  # struct.error, ValueError, OverflowError, ...: its readers check little
        if is_out_of_memory(error):
            raise
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UhdError(f"{name}: cannot be read ({reason}); convert it to PNG or JPEG") from None


@contextmanager
def plain_file(path: str | Path) -> Iterator[BinaryIO]:
    """The file at `path`, which is one: reading a pipe or a device may never end. Raises UhdError."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise UhdError(f"image {path}: is no plain file")
    # Not blocking, should it have become a pipe meanwhile.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise UhdError(f"image {path}: is no plain file")
        yield file


def decode(file: BinaryIO, name: str, formats: tuple[str, ...] | None = None) -> Image.Image:
    """The RGB image in `file`; Pillow tries `formats`, or all it has. To be called in `reading`."""
    try:
        with Image.open(file, formats=formats) as opened:
            return to_rgb(opened, name)
    except UhdError:
        raise
    except Exception as error:
        # Text or a colour profile beside the pixels of a PNG may be too large for Pillow, or broken.
        file.seek(0)
        pixels = _pixels_only(file)
        if pixels is None or is_out_of_memory(error):
            raise
        try:
            with Image.open(pixels, formats=formats) as opened:
                return to_rgb(opened, name)
        except UhdError:
            raise
        except Exception:
            raise error from None


def header(file: BinaryIO, formats: tuple[str, ...] | None = None) -> Image.Image:
    """The image in `file`, opened without its pixels, as `decode` would. To be called in `reading`."""
    try:
        return Image.open(file, formats=formats)
    except (UnidentifiedImageError, Image.DecompressionBombError):
        raise
    except Exception:
        file.seek(0)
        pixels = _pixels_only(file)
        if pixels is None:
            raise
        return Image.open(pixels, formats=formats)


def size_of(file: BinaryIO) -> tuple[int, int]:
    """(width, height) of the image in `file` as it is seen. To be called in `reading`.

    Pixels are decoded only in a PNG, where EXIF may follow them.
    """
    with header(file) as opened:
        width, height = opened.size
        turned = _orientation(opened) in _QUARTER_TURNS
        # Pillow turns a TIFF itself, and has its size turned from the beginning where its tag says so.
        if ExifTags.Base.Orientation in getattr(opened, "tag_v2", ()):
            turned = False
        return (height, width) if turned else (width, height)


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """`image` upright, alpha composited on white, of 8 bits, and RGB. To be called in `reading`.

    Raises UhdError where its values have no meaning as 8 bits.
    """
    deep = not image.mode.startswith("I") and any(";16" in str(tile) for tile in getattr(image, "tile", ()))
    image.load()
    turned = _ORIENTATIONS.get(_orientation(image) or 1)  # as loaded: Pillow turns a TIFF while it loads it
    if turned is not None:
        image = image.transpose(turned)
    if image.mode.startswith("I"):
        image = _to_8_bits(image, name)
    elif image.mode == "F":
        raise UhdError(f"{name}: floating-point pixels have no range of their own; scale them to 8 bits")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba)
    rgb = image if image.mode == "RGB" and turned is not None else image.convert("RGB")
    if deep and int(np.asarray(rgb).max()) < _DARK >> 8:
        raise _too_dark(name, "their high bytes are")
    rgb.info = {"source": name}
    return rgb


def from_array(array: NDArray[Any]) -> Image.Image:
    """A uint8 array (h, w), (h, w, 3) or (h, w, 4) as an image. Raises UhdError for another."""
    if (
        array.dtype != np.uint8
        or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4)))
        or array.size == 0
    ):
        raise UhdError(
            f"image array: {array.dtype} of shape {array.shape}; "
            "expected uint8 of shape (h, w), (h, w, 3) or (h, w, 4)"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def from_tensor(tensor: Any) -> Image.Image:
    """A uint8 tensor of torch, (h, w), (1, h, w), (3, h, w) or (4, h, w), as an image."""
    try:
        array = tensor.detach().cpu().numpy()
    except Exception as error:  # a type that numpy lacks, a tensor without values
        raise UhdError(f"image tensor: has no values for numpy ({error}); give uint8 on the CPU") from None
    if array.ndim == 3 and array.shape[0] in (1, 3, 4):
        array = array[0] if array.shape[0] == 1 else array.transpose(1, 2, 0)
    return from_array(array)


def _orientation(image: Image.Image) -> int | None:
    """How EXIF, or XMP, says that the image is turned; None where it does not, or is no EXIF."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        return None
    return found if isinstance(found, int) else None


def _to_8_bits(image: Image.Image, name: str) -> Image.Image:
    """Grey of 16 bits as L, or LA where one value is transparent; Pillow's own `convert` clips at 255.

    The high byte is taken, as Pillow does for 16-bit colour. Mode I says nothing of its range: values that
    fit 8 bits are taken to be 8 bits.
    """
    values = np.asarray(image)
    least, most = int(values.min()), int(values.max())
    if image.mode == "I" and not 0 <= least <= most < 2**16:
        raise UhdError(f"{name}: values from {least} to {most}; scale them to 8 bits")
    shift = 0 if image.mode == "I" and most < 2**8 else 8
    if shift and 0 < most < _DARK:
        raise _too_dark(name, f"up to {most} are")
    grey = Image.fromarray((values >> shift).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray((values != image.info["transparency"]).astype(np.uint8) * 255))
    return grey


def _too_dark(name: str, what: str) -> UhdError:
    return UhdError(
        f"{name}: 16-bit values {what} nearly black, as those of 12 bits or fewer would be; scale "
        "them to 8 bits"
    )


def _pixels_only(file: BinaryIO) -> BinaryIO | None:
    """The PNG in `file` without text, profiles and other chunks beside its pixels; None where it is none."""
    data = file.read(MAX_BYTES + 1)
    if not data.startswith(_PNG) or len(data) > MAX_BYTES:
        return None
    kept, start = [_PNG], len(_PNG)
    while start + 12 <= len(data):
        stop = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if data[start + 4 : start + 8] in _PNG_PIXELS:
            kept.append(data[start:stop])
        start = stop
    return io.BytesIO(b"".join(kept))
