"""A prompt as a sequence of positions: text tokens and images, each position with a key to its content.

Two sequences that begin with the same keys begin with the same embeddings, so their key-value cache
is the same up to there. Keys are known from sizes and pixels alone, before any crop is encoded.
"""

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from uhd_export.runtime.config import ModelConfig
from uhd_export.runtime.engines.base import Array
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.geometry import check_crop
from uhd_export.runtime.image.layout import layout_indices
from uhd_export.runtime.image.slicing import SlicePlan, plan_slices
from uhd_export.runtime.language.prompt import IMAGE_ID
from uhd_export.runtime.settings import Settings


@dataclass(frozen=True, repr=False)
class PlannedImage:
    """An RGB image, how it is cut, and where each of its positions comes from (see `layout_indices`)."""

    image: Image.Image
    plan: SlicePlan
    grid_mode: str
    source: NDArray[Any]
    tokens: NDArray[Any]
    digest: str

    def __len__(self) -> int:
        return len(self.source)

    def __repr__(self) -> str:
        width, height = self.image.size
        crops = len(self.plan.crop_sizes)
        return f"<PlannedImage {width}x{height}: {crops} crops, {self.grid_mode}, {len(self)} positions>"


def plan_image(image: Image.Image, settings: Settings, model: ModelConfig) -> PlannedImage:
    """Plan `image` (RGB) for `model` as `settings` say. Raises UhdError where it is too elongated."""
    plan = plan_slices(
        image.size,
        max_slices=settings.max_slices,
        resize=settings.resize,
        upscale_only=settings.upscale_only,
        patch=model.vision.patch,
    )
    try:
        for rows, cols in plan.patch_grids:
            if model.projector.pyramid == "jbu":
                check_crop(rows, cols, model.projector.scales)
    except UhdError as error:
        width, height = image.size
        raise UhdError(f"{image.info.get('source', 'image')}: {width}x{height} pixels; {error}") from None
    source, tokens = layout_indices(
        plan.slice_grid, layout=settings.layout, side=model.projector.side, separators=settings.separators
    )
    # Processors compute SHA-256 themselves: half of BLAKE2's time over a photo's pixels.
    content = hashlib.sha256(repr((plan, settings.grid_mode, settings.layout)).encode())
    content.update(image.tobytes())
    return PlannedImage(image, plan, settings.grid_mode, source, tokens, content.hexdigest())


def place(source: NDArray[Any], crops: Sequence[Array], separators: NDArray[Any]) -> list[Array]:
    """The rows of an image in order, as few pieces of `crops` and of `separators` as there can be.

    `source` numbers the rows of `crops`, (N, D) each, laid end to end, and is -1 at separators (see
    `layout_indices`); `separators` are those rows, (count, D).
    """
    size, pieces, used = len(crops[0]), [], 0
    crop = np.where(source < 0, -1, source // size)
    # A piece ends where the next row is not the next of the same crop, nor both are separators.
    follows = (crop[1:] == crop[:-1]) & ((source[1:] == source[:-1] + 1) | (source[1:] < 0))
    starts = [0, *(np.flatnonzero(~follows) + 1).tolist()]
    for start, stop in zip(starts, [*starts[1:], len(source)], strict=True):
        if source[start] < 0:
            pieces.append(separators[used : used + stop - start])
            used += stop - start
        else:
            row = source[start] - crop[start] * size
            pieces.append(crops[crop[start]][int(row) : int(row) + stop - start])
    return pieces


@dataclass(frozen=True)
class Segment:
    """A run of positions: an image, or text tokens."""

    start: int
    content: PlannedImage | tuple[int, ...]

    @property
    def stop(self) -> int:
        """One past the last position."""
        return self.start + len(self.content)


class PromptSequence:
    """The positions of token `ids` (-200 where an image goes) with `images` in their places."""

    def __init__(self, ids: Sequence[int], images: Sequence[PlannedImage]) -> None:
        markers = sum(token == IMAGE_ID for token in ids)
        if markers != len(images):
            raise UhdError(f"prompt has {markers} <image> markers for {len(images)} images")
        if not ids:
            raise UhdError("prompt: empty; ask a question")
        self.segments: list[Segment] = []
        self.keys: list[Hashable] = []
        rest, text = iter(images), []
        for token in ids:
            if token != IMAGE_ID:
                text.append(token)
                continue
            self._append(tuple(text))
            self._append(next(rest))
            text = []
        self._append(tuple(text))

    def __len__(self) -> int:
        return len(self.keys)

    def __repr__(self) -> str:
        images = sum(isinstance(segment.content, PlannedImage) for segment in self.segments)
        return f"<PromptSequence of {len(self)} positions, {images} images>"

    def _append(self, content: PlannedImage | tuple[int, ...]) -> None:
        if not len(content):
            return
        self.segments.append(Segment(len(self.keys), content))
        if isinstance(content, PlannedImage):
            self.keys.extend((content.digest, i) for i in range(len(content)))
        else:
            self.keys.extend(content)
