"""Encoded crops for stage 2, and compositions of them into whole images' visual tokens.

Encoding is the dear part, so crops are encoded once and kept in float16: single slices with two or
three cards, and whole card images. Slices of both are shuffled into new images, such that no colour
has two codes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from uhd_export.model.projector import HiwinProjector
from uhd_export.model.vit import VisionTower
from uhd_export.nano.cards import DIGITS, NAMES, TRAIN_SEED, WINDOW, make_card_image
from uhd_export.nano.train_vision import crop_tokens, geometry_of, to_batch
from uhd_export.nano.windows import SIDE, LabelledCrop, image_crops, label_map
from uhd_export.runtime.files import replacing

SLICES = 6
GRID = (3, 2)


@dataclass(frozen=True)
class Crop:
    """Tokens (144, D) float16; the codes in the crop, and their windows, by colour number (1..)."""

    tokens: torch.Tensor
    codes: dict[int, str]
    places: dict[int, int]

    def thinned(self, rng: np.random.Generator, windows: int) -> "Crop":
        """The crop with its codes' windows and some others, `windows` in all, in their order."""
        places = list(self.places.values())
        others = np.setdiff1d(np.arange(len(self.tokens)), places)
        more = rng.choice(others, max(windows - len(places), 0), replace=False)
        windows_left = np.sort(np.concatenate([np.array(places, np.int64), more]))
        moved = {colour: int(np.searchsorted(windows_left, place)) for colour, place in self.places.items()}
        return Crop(self.tokens[torch.from_numpy(windows_left)], self.codes, moved)


@dataclass(frozen=True)
class TokenPool:
    """Encoded crops: `slices` in any order; `images` with seven crops each, the overview last."""

    slices: list[Crop]
    images: list[list[Crop]]

    def compose(self, rng: np.random.Generator, count: int) -> list[Crop]:
        """`count` slices without two codes of one colour, then any overview."""
        source = self.slices + [crop for image in self.images for crop in image[:-1]]
        crops: list[Crop] = []
        colours: set[int] = set()
        while len(crops) < count:
            crop = source[rng.integers(len(source))]
            if not colours & crop.codes.keys():
                crops.append(crop)
                colours |= crop.codes.keys()
        if self.images:
            crops.append(self.images[rng.integers(len(self.images))][-1])
        return crops


def codes_of(crop: LabelledCrop) -> tuple[dict[int, str], dict[int, int]]:
    """The codes in a labelled crop, and their windows, by colour number."""
    printed = [(i, row) for i, row in enumerate(crop.labels) if row[1] == 1]
    codes = {int(row[0]): "".join(map(str, row[2:])) for _, row in printed}
    return codes, {int(row[0]): i for i, row in printed}


def single_slice(seed: tuple[int, ...]) -> LabelledCrop:
    """A 336x336 card image as one slice."""
    size = (SIDE * WINDOW, SIDE * WINDOW)
    image, cards = make_card_image(seed, size)
    return LabelledCrop(np.asarray(image), label_map(cards, size).reshape(SIDE * SIDE, -1))


def encode(
    tower: VisionTower, projector: HiwinProjector, crops: list[LabelledCrop], levels: tuple[int, ...]
) -> list[Crop]:
    """Encode equal crops."""
    pixels, _ = to_batch(crops)
    with torch.no_grad():
        tokens = crop_tokens(tower, projector, pixels, geometry_of(pixels.shape), levels).half()
    return [Crop(t.clone(), *codes_of(crop)) for t, crop in zip(tokens, crops, strict=True)]


def build_pool(
    tower: VisionTower,
    projector: HiwinProjector,
    *,
    levels: tuple[int, ...],
    slices: int,
    images: int,
    seed: int,
    log: Callable[[str], None],
) -> TokenPool:
    """Encode `slices` single slices and `images` whole images of the training seed."""
    pool = TokenPool([], [])
    for i in range(slices):
        pool.slices.extend(encode(tower, projector, [single_slice((TRAIN_SEED, seed, i, 0))], levels))
        if (i + 1) % 100 == 0:
            log(f"encoded {i + 1}/{slices} slices")
    for i in range(images):
        crops = image_crops((TRAIN_SEED, seed, i, 1))
        encoded = encode(tower, projector, crops[:-1], levels) + encode(tower, projector, crops[-1:], levels)
        pool.images.append(encoded)
        if (i + 1) % 20 == 0:
            log(f"encoded {i + 1}/{images} images")
    return pool


def save_pool(pool: TokenPool, path: Path) -> None:
    """Write a pool as safetensors."""
    crops = pool.slices + [crop for image in pool.images for crop in image]
    codes = torch.full((len(crops), len(NAMES)), -1, dtype=torch.int32)
    places = codes.clone()
    for i, crop in enumerate(crops):
        for colour, code in crop.codes.items():
            codes[i, colour - 1], places[i, colour - 1] = int(code), crop.places[colour]
    tensors = {
        "tokens": torch.stack([crop.tokens for crop in crops]),
        "codes": codes,
        "places": places,
        "slices": torch.tensor(len(pool.slices)),
    }
    with replacing(path) as partial:
        save_file(tensors, partial)


def load_pool(path: Path) -> TokenPool:
    """Read what `save_pool` wrote."""
    state = load_file(path)
    crops = []
    for tokens, codes, places in zip(
        state["tokens"], state["codes"].tolist(), state["places"].tolist(), strict=True
    ):
        printed = {i + 1: f"{code:0{DIGITS}d}" for i, code in enumerate(codes) if code >= 0}
        crops.append(Crop(tokens, printed, {i: places[i - 1] for i in printed}))
    first = int(state["slices"])
    images = [crops[i : i + SLICES + 1] for i in range(first, len(crops), SLICES + 1)]
    return TokenPool(crops[:first], images)
