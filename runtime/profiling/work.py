"""What the graphs of a bundle compute and move: FLOPs and bytes by stage."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from uhd_export.runtime.bundle.manifest import Manifest
from uhd_export.runtime.profiling import costs
from uhd_export.runtime.profiling.costs import Grid
from uhd_export.runtime.profiling.stages import VISION_STAGES

_HEAD_GROUP = 128


@dataclass(frozen=True)
class Work:
    """FLOPs, and bytes of weights and activations with nothing fused: the most that may move."""

    flops: int
    bytes: int

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)


def stage_work(grids: Sequence[Grid], manifest: Manifest, positions: int, grid_mode: str) -> dict[str, Work]:
    """By stage; "vision" is the sum of its three, "decode" one token after `positions`.

    Without folding, the projector and the JBU's last fix-up are the released computation, but crops
    are not padded, the last ViT layer is gone and logits are for the last position only.
    """
    model, folded = manifest.model, manifest.fold
    vision: dict[str, list[costs.Parts]] = {
        "vit": [costs.vit(grids, model.vision, folded=True)],
        "jbu": [costs.jbu(grids, model.projector, folded=folded)],
        # Crops of one shape are a batch of their own: none is padded to another's windows.
        "hiwin": [
            costs.projector(
                [g for g in grids if g == shape], model.projector, folded=folded, grid_mode=grid_mode
            )
            for shape in dict.fromkeys(grids)
        ],
    }
    found = {
        name: sum((_vision_work(parts, manifest, name) for parts in several), Work(0, 0))
        for name, several in vision.items()
    }
    found["vision"] = sum((found[stage] for stage in VISION_STAGES), Work(0, 0))
    language = {
        "prefill": costs.prefill(model.language, positions, folded=True),
        "decode": costs.decode(model.language, positions),
    }
    # What a step reads of the cache; a prompt attends to what is fresh.
    read = {"prefill": 0, "decode": positions}
    return found | {
        name: _language_work(parts, manifest, costs.cached_values(model.language, read[name]))
        for name, parts in language.items()
    }


def _vision_work(parts: costs.Parts, manifest: Manifest, stage: str) -> Work:
    """Weights in the type they are stored in, all else in the vision part's own."""
    item = np.dtype(manifest.precision.vision).itemsize
    int8 = manifest.vision_quantization is not None and stage != "jbu"
    whole = costs.total(parts)
    moved = sum(
        cost.weights * (1 if int8 and name not in costs.APART else item) for name, cost in parts.items()
    )
    return Work(whole.flops, moved + whole.activations * item)


def _language_work(parts: costs.Parts, manifest: Manifest, cached: int) -> Work:
    """Linear layers and head in the type they are stored in, `cached` values in the cache's, all else in the
    language model's own.
    """
    item = np.dtype(manifest.precision.language).itemsize
    stored, linear, head = manifest.quantization, float(item), float(item)
    if stored is not None and stored.method is not None:
        linear = 0.5 + item / stored.group
    if stored is not None and stored.head_bits is not None:
        head = stored.head_bits / 8 + item / _HEAD_GROUP
    moved = sum(cost.weights * (head if name == "head" else linear) for name, cost in parts.items())
    moved += cached * (np.dtype(manifest.precision.cache).itemsize - item)
    whole = costs.total(parts)
    return Work(whole.flops, round(moved + whole.activations * item))


def stored_types(manifest: Manifest) -> dict[str, str]:
    """Of the vision part and the language model: the type of activations, and what weights are stored in."""
    vision, language = manifest.precision.vision, manifest.precision.language
    stored, weights = manifest.quantization, []
    if stored is not None and stored.method is not None:
        weights.append("int4 weights")
    if stored is not None and stored.head_bits is not None:
        weights.append(f"{stored.lm_head} head")
    if manifest.precision.cache != language:
        weights.append(f"{manifest.precision.cache} cache")
    return {
        "vision": vision if manifest.vision_quantization is None else f"{vision} with int8 weights",
        "language": f"{language} with {', '.join(weights)}" if weights else language,
    }
