"""The profile as tables, next to the paper's figures and what those measure."""

from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from uhd_export.runtime.profiling.profiler import EngineMemory, ModeProfile, Profile, Spread
from uhd_export.runtime.terminal.report import format_bytes

# LLaVA-UHD v2, Table 4: hours of training, seconds of latency, gigabytes.
PAPER = {"selective": (27.7, 0.54, 39.4), "fix": (26.9, 0.62, 41.7), "pyramid": (62.4, 1.26, 60.3)}
PAPER_NOTE = (
    "The paper's Table 4: period and memory are of fine-tuning on 8 x A100; only the latency is of "
    "inference, of a 1008x672 image on one A100, without its type, software or number of tokens. The "
    "ratios of its FLOPs fit one forward pass, so it is set beside the time to the first token."
)
MEMORY_NOTE = (
    "Peak memory is of a process of its own for each mode, weights and image included, that opens the bundle "
    "and answers once."
)
SPLIT_NOTE = (
    "ViT, JBU and Hiwin are one graph: its median time is divided by the shares of its nodes in a trace of a "
    "separate session, three runs after one that warms up; nodes that graph optimizations renamed count with "
    "the stage they run in."
)
_NAMES = {
    "pixels": "slicing and pixels",
    "vision": "vision",
    "vit": "  ViT",
    "jbu": "  JBU",
    "hiwin": "  Hiwin",
    "prefill": "prefill",
    "decode": "decode, a token",
}


def describe_profile(profile: Profile) -> dict[str, Any]:
    """The profile ready for JSON, seconds, bytes and FLOPs as numbers, with the paper's rows."""
    facts = asdict(profile)
    for mode, record in zip(profile.modes, facts["modes"], strict=True):
        for name, stage in mode.stages.items():
            record["stages"][name]["flops_per_second"] = stage.flops_per_second
    facts["paper"] = {
        "note": PAPER_NOTE,
        "rows": {
            grid_mode: {"training_hours": hours, "latency_seconds": latency, "training_gigabytes": gigabytes}
            for grid_mode, (hours, latency, gigabytes) in PAPER.items()
        },
    }
    return facts


def print_profile(profile: Profile, console: Console | None = None) -> None:
    """Print the profile for people."""
    console = console or Console()
    machine = profile.machine
    console.print(
        f"{escape(profile.bundle)}: {profile.backend}, vision {profile.precision['vision']}, language "
        f"{profile.precision['language']}; {machine['processor']}, {machine['threads']} threads, "
        f"{machine['device']}"
    )
    console.print(
        f"image {profile.size[0]}x{profile.size[1]}: {profile.crops} crops, {profile.visual_tokens} visual "
        f"tokens, {profile.positions} positions; {profile.repeats} runs after a warm-up: median, and "
        "half the distance between the quartiles in percent of it"
    )
    console.print(_times(profile))
    console.print(_work(profile))
    console.print(_modes(profile))
    console.print(
        f"weights {format_bytes(profile.weight_bytes)}; KV cache {format_bytes(profile.kv_bytes)} for "
        f"{profile.positions} positions, {format_bytes(profile.kv_bytes_allocated)} allocated"
    )
    for name, memory in profile.engines.items():
        console.print(_engine(name, memory))
    if any(mode.peak_bytes is not None for mode in profile.modes):
        console.print(f"[dim]{MEMORY_NOTE}[/dim]")
    console.print(f"[dim]{PAPER_NOTE}[/dim]")
    if profile.vision_split:
        console.print(f"[dim]{SPLIT_NOTE}[/dim]")


def _times(profile: Profile) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("milliseconds")
    for mode in profile.modes:
        table.add_column(mode.grid_mode, justify="right")
    for name in _stage_names(profile):
        stages = (mode.stages.get(name) for mode in profile.modes)
        table.add_row(_NAMES[name], *("" if s is None else _milliseconds(s.seconds) for s in stages))
    table.add_row("to the first token", *(_milliseconds(mode.first_token) for mode in profile.modes))
    return table


def _work(profile: Profile) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("\nwork", no_wrap=True)
    for mode in profile.modes:
        table.add_column(f"{mode.grid_mode}\nGFLOP", justify="right")
        table.add_column("\nGFLOP/s", justify="right")
    for name in _stage_names(profile):
        cells = []
        for mode in profile.modes:
            stage = mode.stages.get(name)
            if stage is None or stage.flops is None or stage.flops_per_second is None:
                cells += ["", ""]
            else:
                cells += [f"{stage.flops / 1e9:,.3g}", f"{stage.flops_per_second / 1e9:,.1f}"]
        if any(cells):
            table.add_row(_NAMES[name], *cells)
    return table


def _stage_names(profile: Profile) -> list[str]:
    return [name for name in _NAMES if any(name in mode.stages for mode in profile.modes)]


def _modes(profile: Profile) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("\ngrid", no_wrap=True)
    ours = ("first\ntoken, ms", "\ntokens/s", "peak\nmemory")
    for name in (*ours, "paper's\nlatency", "training\nperiod", "training\nmemory"):
        table.add_column(name, justify="right", no_wrap=True)
    for mode in profile.modes:
        table.add_row(*_mode_cells(mode))
    return table


def _mode_cells(mode: ModeProfile) -> list[str]:
    hours, latency, gigabytes = PAPER[mode.grid_mode]
    peak = "not taken" if mode.peak_bytes is None else format_bytes(mode.peak_bytes)
    return [
        mode.grid_mode,
        _milliseconds(mode.first_token),
        f"{mode.tokens_per_second:,.1f}",
        peak,
        f"{latency:.2f} s",
        f"{hours:.1f} h",
        f"{gigabytes:.1f} GB",
    ]


def _engine(name: str, memory: EngineMemory) -> str:
    weights = "unknown" if memory.weight_bytes is None else format_bytes(memory.weight_bytes)
    text = (
        f"{name} engine on the device: weights {weights}, {format_bytes(memory.used_bytes)} beside them here"
    )
    if memory.most_scratch_bytes is not None:
        text += f", {format_bytes(memory.most_scratch_bytes)} for activations of the largest shapes"
    return text


def _milliseconds(spread: Spread) -> str:
    """The median, with the spread where there is one."""
    text = f"{spread.median * 1e3:,.1f}"
    if spread.low == spread.high:
        return text
    return f"{text} ±{(spread.high - spread.low) / 2 / spread.median:.0%}"
