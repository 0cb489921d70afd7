"""Stage 1: vision tower and projector learn to read, with a dense loss on the 144 windows.

A throw-away linear head predicts from every window token the colour, whether a code is printed
there, and its digits. First with level 1x alone (`levels=(1,)`), which is cheap; then with all three.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from uhd_export.model.jbu import JbuStack, matrices
from uhd_export.model.projector import HiwinProjector
from uhd_export.model.vit import Geometry, VisionTower
from uhd_export.nano.cards import DIGITS, NAMES, TRAIN_SEED
from uhd_export.nano.fast import pyramid, vit_features, window_tokens
from uhd_export.nano.windows import IGNORE, LabelledCrop, image_crops, packed_slice
from uhd_export.plugins.jbu.reference import FIXUP
from uhd_export.runtime.image.geometry import crop_geometry
from uhd_export.runtime.image.pixels import normalise

COLOUR_CLASSES = len(NAMES) + 1
OUTPUTS = COLOUR_CLASSES + 2 + 10 * DIGITS


def geometry_of(crop_shape: tuple[int, ...]) -> Geometry:
    """Geometry tensors of crops (..., h, w) in pixels."""
    rows, cols = (n // 14 for n in crop_shape[-2:])
    return {name: torch.from_numpy(a) for name, a in crop_geometry(rows, cols).items()}


def to_batch(crops: list[LabelledCrop]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (B, 3, h, w) float32 and labels (B, 144, 2 + DIGITS) of equal crops."""
    pixels = np.stack([normalise(crop.pixels) for crop in crops])
    return torch.from_numpy(pixels), torch.from_numpy(np.stack([crop.labels for crop in crops]))


def make_batch(rng: np.random.Generator, size: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A training batch: "packed" slices, with a few of real images, or "overview" crops."""
    if kind == "overview":
        return to_batch([image_crops(_image_seed(rng))[-1] for _ in range(size)])
    crops = [packed_slice(rng) for _ in range(size - size // 4)]
    while len(crops) < size:
        crops.extend(image_crops(_image_seed(rng))[:-1][: size - len(crops)])
    return to_batch(crops)


def _image_seed(rng: np.random.Generator) -> tuple[int, int]:
    return TRAIN_SEED, int(rng.integers(2**31))


def dense_loss(outputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
    """Sum of the three cross entropies of (B, 144, OUTPUTS) predictions, and accuracies."""
    colour, code, digits = outputs.float().split([COLOUR_CLASSES, 2, 10 * DIGITS], -1)
    digits = digits.unflatten(-1, (DIGITS, 10))
    loss = F.cross_entropy(colour.flatten(0, 1), labels[..., 0].flatten(), ignore_index=IGNORE)
    loss = loss + F.cross_entropy(code.flatten(0, 1), labels[..., 1].flatten(), ignore_index=IGNORE)
    printed = labels[..., 1] == 1
    scores = {}
    known = labels[..., 0] != IGNORE
    scores["colour"] = (colour.argmax(-1) == labels[..., 0])[known].float().mean().item()
    scores["found"] = (code.argmax(-1) == labels[..., 1]).float().mean().item()
    if printed.any():
        planned = digits[printed]
        loss = loss + 3 * F.cross_entropy(planned.flatten(0, 1), labels[..., 2:][printed].flatten())
        scores["codes"] = (planned.argmax(-1) == labels[..., 2:][printed]).all(-1).float().mean().item()
    return loss, scores


def crop_tokens(
    tower: VisionTower,
    projector: HiwinProjector,
    pixels: torch.Tensor,
    geometry: Geometry,
    levels: tuple[int, ...],
) -> torch.Tensor:
    """(B, 144, D) tokens; gradients reach the vision tower through level 1x alone."""
    features = vit_features(tower, pixels, geometry)
    maps = {1: features}
    if len(levels) > 1:
        stack = projector.upsampler.upsampler
        assert isinstance(stack, JbuStack)  # nano's own
        maps.update({s: m for s, m in pyramid(stack, features.detach(), pixels, geometry).items() if s > 1})
        weight, bias = matrices(stack.fixup_proj, 1)
        maps[levels[-1]] = maps[levels[-1]] + FIXUP * F.linear(maps[levels[-1]], weight, bias)
    return window_tokens(projector, maps, geometry, levels)


@dataclass(frozen=True)
class VisionStage:
    """One stage: scales of the pyramid, steps of `batch` crops, and how often a batch is of overviews."""

    levels: tuple[int, ...]
    steps: int
    batch: int
    rate: float
    overview_every: int  # steps; 0: never


def train_vision(
    tower: VisionTower,
    projector: HiwinProjector,
    head: nn.Linear,
    stage: VisionStage,
    *,
    seed: int,
    log: Callable[[str], None],
    save: Callable[[], None],
) -> None:
    """Train in place with AdamW, a linear warm-up and a cosine decay to a twentieth."""
    steps, rate, levels = stage.steps, stage.rate, stage.levels
    rng = np.random.default_rng((TRAIN_SEED, seed))
    parameters = [p for m in (tower, projector, head) for p in m.parameters() if p is not projector.pos_embed]
    optimiser = torch.optim.AdamW(parameters, rate, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = min(100, steps // 5)
    geometries: dict[tuple[int, int], Geometry] = {}
    start = time.monotonic()
    average: dict[str, float] = {}
    for step in range(1, steps + 1):
        kind = "overview" if stage.overview_every and step % stage.overview_every == 0 else "packed"
        pixels, labels = make_batch(rng, stage.batch, kind)
        geometry = geometries.setdefault((pixels.shape[2], pixels.shape[3]), geometry_of(pixels.shape))
        for group in optimiser.param_groups:
            progress = max(step - warmup, 0) / max(steps - warmup, 1)
            group["lr"] = rate * min(step / warmup, 0.05 + 0.95 * (1 + np.cos(np.pi * progress)) / 2)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = head(crop_tokens(tower, projector, pixels, geometry, levels))
        loss, scores = dense_loss(outputs, labels)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        for name, value in {"loss": loss.item(), **scores}.items():
            average[name] = 0.9 * average.get(name, value) + 0.1 * value
        if step % 20 == 0 or step == steps:
            text = " ".join(f"{name} {value:.3f}" for name, value in average.items())
            log(f"vision {levels} step {step}/{steps} {text} {time.monotonic() - start:.0f} s")
        if step % 100 == 0 or step == steps:
            save()
