"""Images on their way: bytes from strangers, cut for the vision engine."""

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray
from PIL import Image

from uhd_export.runtime.config import ModelConfig
from uhd_export.runtime.engines.base import Array
from uhd_export.runtime.image.pixels import cut
from uhd_export.runtime.image.source import from_bytes
from uhd_export.runtime.language.sequence import PlannedImage, plan_image
from uhd_export.runtime.serving.images.encoded import EncodedImages
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
    return from_bytes(data, formats=FORMATS, max_pixels=max_pixels)


class ImageCutter:
    """Plans and cuts images, in any thread."""

    def __init__(self, model: ModelConfig, settings: Settings, encoded: EncodedImages) -> None:
        self._model, self.settings, self._encoded = model, settings, encoded

    def plan(self, image: Image.Image) -> PlannedImage:
        """How `image` is cut. Raises UhdError where it cannot be."""
        return plan_image(image, self.settings, self._model)

    def cut(self, image: Image.Image) -> tuple[CutImage, float]:
        """`image` ready to be encoded, and the seconds that took; not cut where it was encoded before."""
        start = time.perf_counter()
        planned = self.plan(image)
        rows = self._encoded.get(planned.digest)
        crops = () if rows is not None else tuple(cut(planned.image, planned.plan))
        # The pixels are not wanted any more: a waiting line of photographs would hold gigabytes.
        planned = dataclasses.replace(planned, image=_NO_PIXELS)
        return CutImage(planned, crops, rows), time.perf_counter() - start
