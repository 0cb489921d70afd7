"""Images on their way: bytes from strangers, cut for the vision engine, and encoded, kept by content."""

import dataclasses
import io
import threading
import time
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from uhd_export.runtime.config import ModelConfig
from uhd_export.runtime.engines.base import Array
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.pixels import cut, open_image
from uhd_export.runtime.language.sequence import PlannedImage, plan_image
from uhd_export.runtime.settings import Settings

# What Pillow may try: not its readers that start other programs or were never meant for strangers' files.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_NO_PIXELS = Image.new("RGB", (1, 1))


@dataclass(frozen=True)
class CutImage:
    """A planned image, its pixels dropped: either its crops, or its embeddings where they were known."""

    planned: PlannedImage
    crops: tuple[NDArray[Any], ...] = ()
    rows: Array | None = None


def read_image(data: bytes, *, max_pixels: int) -> Image.Image:
    """The RGB image in `data`. Raises UhdError where it is none or larger, before its pixels are made."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is ours
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                width, height = opened.size
                if width * height > max_pixels:
                    raise _too_many(max_pixels)
                return open_image(opened)
    except Image.DecompressionBombError:  # Pillow's own limit, which comes first
        raise _too_many(max_pixels) from None
    except UnidentifiedImageError:
        raise UhdError(f"image: no image of a known format; send {', '.join(FORMATS)}") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise UhdError(f"image: cannot be read ({error}); convert it to PNG or JPEG") from None


def _too_many(max_pixels: int) -> UhdError:
    return UhdError(f"image: more than {max_pixels / 1e6:.0f} megapixels; send it smaller")


class EncodedImages:
    """Embeddings of images by digest, within `budget` bytes: the ones not used for longest go first."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.nbytes = 0
        self._rows: OrderedDict[str, Array] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, digest: str) -> Array | None:
        """(positions, D) embeddings of an image, or None where they are not here."""
        with self._lock:
            if digest in self._rows:
                self._rows.move_to_end(digest)
            return self._rows.get(digest)

    def put(self, digest: str, rows: Array) -> None:
        """Keep `rows`, unless they alone are over the budget."""
        with self._lock:
            if digest in self._rows or rows.nbytes > self.budget:
                return
            self._rows[digest] = rows
            self.nbytes += rows.nbytes
            while self.nbytes > self.budget:
                self.nbytes -= self._rows.popitem(last=False)[1].nbytes


class ImageCutter:
    """Plans and cuts images, in any thread."""

    def __init__(self, model: ModelConfig, settings: Settings, encoded: EncodedImages) -> None:
        self._model, self.settings, self._encoded = model, settings, encoded

    def plan(self, image: Image.Image) -> PlannedImage:
        """How `image` is cut. Raises UhdError where it cannot be."""
        model = self._model
        return plan_image(image, self.settings, side=model.projector.side, patch=model.vision.patch)

    def cut(self, image: Image.Image) -> tuple[CutImage, float]:
        """`image` ready to be encoded, and the seconds that took; not cut where it was encoded before."""
        start = time.perf_counter()
        planned = self.plan(image)
        rows = self._encoded.get(planned.digest)
        crops = () if rows is not None else tuple(cut(planned.image, planned.plan))
        # The pixels are not wanted any more: a waiting line of photographs would hold gigabytes.
        planned = dataclasses.replace(planned, image=_NO_PIXELS)
        return CutImage(planned, crops, rows), time.perf_counter() - start
