"""FLOPs and bytes of a row, as the released code executes it and as this project exports it."""

from dataclasses import asdict
from typing import Any

from uhd_export.runtime.image.layout import visual_token_count
from uhd_export.runtime.image.slicing import plan_slices
from uhd_export.runtime.planning.memory import TEXT_POSITIONS
from uhd_export.runtime.profiling import costs
from uhd_export.runtime.profiling.costs import Cost, Grid, Parts
from uhd_export.study.convnext import convnext_parts, level_linear
from uhd_export.study.rows import CONVNEXT, SIZE, Row

# Modules that a counter hooked on Linear and Conv sees, by stage; of products of activations it sees none.
_HOOKED = {
    "vit": ("patches", "projections", "mlp", "stage1", "stage2", "stage3", "stage4"),
    "jbu": ("range", "kernel_fixup", "fixup", "up2x", "up4x", "up8x"),
    "projector": ("level_linear", "cat"),
    "prefill": ("projections", "mlp", "head"),
}


def patch_grids(row: Row) -> list[Grid]:
    """(rows, columns) of patches of every crop of the study's image."""
    return plan_slices(SIZE, patch=row.model.vision.patch).patch_grids


def count_row(row: Row) -> dict[str, Any]:
    """Positions, and FLOPs and elements by stage of both forms, with their sums, ready for JSON."""
    plan = plan_slices(SIZE, patch=row.model.vision.patch)
    visual = visual_token_count(plan.slice_grid, layout=row.layout, side=row.model.projector.side)
    positions = visual + TEXT_POSITIONS
    stages = {kind: _stages(row, positions, folded=kind == "exported") for kind in ("released", "exported")}
    counted = {
        kind: {
            "stages": {name: asdict(costs.total(parts)) for name, parts in each.items()},
            "first_token": asdict(sum((costs.total(parts) for parts in each.values()), Cost())),
        }
        for kind, each in stages.items()
    }
    hooked = sum(
        parts[name].flops
        for stage, parts in stages["released"].items()
        for name in _HOOKED.get(stage, parts)
        if name in parts
    )
    return {"visual_tokens": visual, "positions": positions, **counted, "hooked_flops": hooked}


def _stages(row: Row, positions: int, *, folded: bool) -> dict[str, Parts]:
    """The stages up to the first token."""
    grids = patch_grids(row)
    found = costs.stage_costs(grids, row.model, positions, folded=folded, grid_mode=row.grid_mode)
    del found["decode"]
    if row.encoder == CONVNEXT:  # its own maps are the pyramid; the projector differs in the level's inputs
        crops = [(rows * row.model.vision.patch, cols * row.model.vision.patch) for rows, cols in grids]
        projector = costs.projector(grids, row.model.projector, folded=False, grid_mode=row.grid_mode)
        projector["level_linear"] = level_linear(crops, row.model.projector.hidden)
        found |= {"vit": convnext_parts(crops), "jbu": {}, "projector": projector}
    return found
