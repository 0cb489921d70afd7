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
    """A planned image, its pixels dropped: either its crops, or its embeddings where they were known.

    `seconds` is what planning and cutting took.
    """

    planned: PlannedImage
    crops: tuple[NDArray[Any], ...] = ()
    rows: Array | None = None
    seconds: float = 0.0

    @property
    def nbytes(self) -> int:
        """Size of the crops."""
        return sum(crop.nbytes for crop in self.crops)


def read_image(data: bytes, *, max_pixels: int) -> Image.Image:
    """The RGB image in `data`. Raises UhdError where it is none or larger, before its pixels are made."""
    return from_bytes(data, formats=FORMATS, max_pixels=max_pixels)


class ImageCutter:
    """Plans and cuts images, in any thread."""

    def __init__(self, model: ModelConfig, settings: Settings, encoded: EncodedImages) -> None:
        self._model, self.settings, self._encoded = model, settings, encoded

    def cut(self, image: Image.Image) -> CutImage:
        """`image` ready to be encoded; not cut where it was before. Raises UhdError where it cannot be."""
        start = time.perf_counter()
        planned = plan_image(image, self.settings, self._model)
        rows = self._encoded.get(planned.digest)
        crops = () if rows is not None else tuple(cut(planned.image, planned.plan))
        # The pixels are not wanted any more: a waiting line of photographs would hold gigabytes.
        planned = dataclasses.replace(planned, image=_NO_PIXELS)
        return CutImage(planned, crops, rows, time.perf_counter() - start)
