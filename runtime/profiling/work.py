"""What the graphs of a bundle compute and move: FLOPs and bytes by stage."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from uhd_export.runtime.bundle.manifest import Manifest
from uhd_export.runtime.profiling import costs
from uhd_export.runtime.profiling.costs import INT4_BYTES, Cost, Grid
from uhd_export.runtime.profiling.stages import VISION_STAGES


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
    # Crops of one shape are a batch of their own: none is padded to another's windows.
    projector = sum(
        (
            costs.total(
                costs.projector(
                    [g for g in grids if g == shape], model.projector, folded=folded, grid_mode=grid_mode
                )
            )
            for shape in dict.fromkeys(grids)
        ),
        Cost(),
    )
    vision = {
        "vit": costs.total(costs.vit(grids, model.vision, folded=True)),
        "jbu": costs.total(costs.jbu(grids, model.projector, folded=folded)),
        "hiwin": projector,
    }
    item = np.dtype(manifest.precision.vision).itemsize
    found = {name: Work(cost.flops, cost.elements * item) for name, cost in vision.items()}
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


def _language_work(parts: costs.Parts, manifest: Manifest, cached: int) -> Work:
    """Linear layers in the type they are stored in, `cached` values in the cache's, all else in the
    language model's own."""
    item = np.dtype(manifest.precision.language).itemsize
    packed = manifest.quantization is not None and manifest.quantization.method is not None
    linear = sum(cost.weights for name, cost in parts.items() if name != "head")
    moved = linear * (INT4_BYTES if packed else item) + parts["head"].weights * item
    moved += cached * (np.dtype(manifest.precision.cache).itemsize - item)
    whole = costs.total(parts)
    return Work(whole.flops, round(moved + whole.activations * item))
