"""What the command line prints: tables for people, the same facts as JSON for machines."""

import json
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from uhd_export.runtime.choices import LAYOUTS
from uhd_export.runtime.config import ModelConfig, official
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.layout import Separators, indicator_tokens, visual_token_count
from uhd_export.runtime.image.slicing import SlicePlan
from uhd_export.runtime.planning.memory import TEXT_POSITIONS
from uhd_export.runtime.profiling.costs import (
    INT4_BYTES,
    keys_per_window,
    kv_cache_bytes,
    language_bytes,
    stage_costs,
    total,
)
from uhd_export.runtime.terminal.console import output
from uhd_export.runtime.units import format_bytes

REFERENCE_MODEL = "Vicuna-7B"


def describe_plan(
    plan: SlicePlan, *, grid_mode: str = "selective", model: str = REFERENCE_MODEL
) -> dict[str, Any]:
    """What follows from `plan`, ready for JSON. Sizes, grids and patches are [width, height].

    `refused` says why the official `model` with three levels cannot run it, or is None; `costs` are for
    this model and the layout *flat*.
    """
    shape = official(model)
    visual = {layout: visual_token_count(plan.slice_grid, layout=layout) for layout in LAYOUTS}
    crops = [
        {
            "size": list(size),
            "patches": [cols, rows],
            "keys_per_window": _keys((rows, cols), shape, grid_mode),
        }
        for size, (rows, cols) in zip(plan.crop_sizes, plan.patch_grids, strict=True)
    ]
    return {
        "source_size": list(plan.source_size),
        "resized_size": list(plan.resized_size),
        "slice_grid": plan.slice_grid and list(plan.slice_grid),
        "slice_size": plan.slice_size and list(plan.slice_size),
        "refined_size": plan.refined_size and list(plan.refined_size),
        "overview_size": list(plan.overview_size),
        "indicator_tokens": indicator_tokens(plan.slice_grid, Separators()),
        "visual_tokens": visual,
        "grid_mode": grid_mode,
        "crops": crops,
        "refused": _refused(plan, shape, grid_mode),
        "costs": _costs(plan, shape, model, visual["flat"] + TEXT_POSITIONS, grid_mode),
    }


def _keys(grid: tuple[int, int], config: ModelConfig, mode: str) -> int:
    return keys_per_window(grid, config.projector, mode)


def _refused(plan: SlicePlan, config: ModelConfig, mode: str) -> str | None:
    """Why the model cannot run the crops, in the words it would use; None where it can."""
    try:
        for rows, cols in set(plan.patch_grids):
            config.geometry(rows, cols, grid_mode=mode)
    except UhdError as error:
        return str(error)
    return None


def _costs(plan: SlicePlan, config: ModelConfig, model: str, positions: int, mode: str) -> dict[str, Any]:
    stages: dict[str, dict[str, Any]] = {}
    for kind, folded in (("released", False), ("exported", True)):
        costs = stage_costs(plan.patch_grids, config, positions, folded=folded, grid_mode=mode)
        for stage, parts in costs.items():
            stages.setdefault(stage, {})[kind] = asdict(total(parts))
    return {
        "model": model,
        "positions": positions,
        "stages": stages,
        "language_bytes": {
            "float16": language_bytes(config.language),
            "int4": language_bytes(config.language, INT4_BYTES),
        },
        "kv_bytes_float16": kv_cache_bytes(config.language, positions),
    }


def print_json(facts: dict[str, Any]) -> None:
    """Print `facts` as JSON, for machines."""
    print(json.dumps(facts, indent=2))


def print_plan(facts: dict[str, Any], console: Console | None = None) -> None:
    """Print the facts of `describe_plan` as tables."""
    console = console or output()
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("source", _size(facts["source_size"]))
    if facts["resized_size"] != facts["source_size"]:
        table.add_row("resized", _size(facts["resized_size"]))
    *slices, overview = facts["crops"]
    if slices:
        table.add_row("grid", f"{_size(facts['slice_grid'])} slices (columns x rows)")
        table.add_row("slice", _crop(slices[0]))
    else:
        table.add_row("grid", "none: the overview alone")
    table.add_row("overview", _crop(overview))
    if slices:
        table.add_row("indicators", " ".join(map(str, facts["indicator_tokens"])))
    counts = ", ".join(f"{count} {layout}" for layout, count in facts["visual_tokens"].items())
    table.add_row("visual tokens", counts)
    console.print(table)
    if facts["refused"]:
        console.print(f"refused: {facts['refused']}", soft_wrap=True)
    _print_costs(facts["costs"], console)


def _print_costs(costs: dict[str, Any], console: Console) -> None:
    title = f"{costs['model']}, {costs['positions']} positions ({TEXT_POSITIONS} of text)"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("GFLOP")
    table.add_column("as released", justify="right")
    table.add_column("as exported", justify="right")
    for stage, kinds in costs["stages"].items():
        name = "decode, a token" if stage == "decode" else stage
        table.add_row(name, *(f"{kinds[kind]['flops'] / 1e9:,.1f}" for kind in ("released", "exported")))
    console.print(table)
    weights = ", ".join(f"{format_bytes(size)} {dtype}" for dtype, size in costs["language_bytes"].items())
    console.print(f"language weights {weights}; KV cache {format_bytes(costs['kv_bytes_float16'])} float16")


def _size(size: list[int]) -> str:
    return f"{size[0]} x {size[1]}"


def _crop(crop: dict[str, Any]) -> str:
    return (
        f"{_size(crop['size'])} ({_size(crop['patches'])} patches, {crop['keys_per_window']} keys a window)"
    )
