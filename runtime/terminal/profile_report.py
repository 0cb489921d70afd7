"""The profile as tables, next to the paper's figures and what those measure."""

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from uhd_export.runtime.profiling.compare import Comparison
from uhd_export.runtime.profiling.facts import warnings
from uhd_export.runtime.profiling.paper import PAPER, PAPER_NOTE
from uhd_export.runtime.profiling.profiler import EngineMemory, ModeProfile, Profile
from uhd_export.runtime.profiling.spread import Spread
from uhd_export.runtime.terminal.console import output
from uhd_export.runtime.units import format_bytes

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


def print_profile(profile: Profile, console: Console | None = None) -> None:
    """Print the profile for people."""
    console = console or output()
    machine = profile.machine
    console.print(
        f"{escape(profile.bundle)}: {profile.backend}, vision {profile.precision['vision']}, language "
        f"{profile.precision['language']}; {machine['processor']}, {machine['threads']} threads, "
        f"{machine['device']}"
    )
    console.print(
        f"image {profile.size[0]}x{profile.size[1]}: {profile.crops} crops, {profile.visual_tokens} visual "
        f"tokens, {profile.positions} positions; {profile.repeats} runs once steady: median, and "
        "half the distance between the quartiles in percent of it"
    )
    console.print(_times(profile))
    console.print(_work(profile))
    console.print(_modes(profile))
    for mode in profile.modes:
        console.print(_rest(mode))
    if profile.rates is not None:
        rates = profile.rates
        console.print(
            f"the machine itself: {rates.flops_per_second / 1e9:,.0f} GFLOP/s, "
            f"{rates.bytes_per_second / 1e9:,.1f} GB/s ({rates.how})"
        )
    console.print(
        f"weights {format_bytes(profile.weight_bytes)}; KV cache {format_bytes(profile.kv_bytes)} for "
        f"{profile.positions} positions, {format_bytes(profile.kv_bytes_allocated)} allocated"
    )
    for name, memory in profile.engines.items():
        console.print(_engine(name, memory))
    for warning in warnings(profile):
        console.print(f"[yellow]{escape(warning)}[/yellow]")
    if any(mode.peak_bytes is not None for mode in profile.modes):
        console.print(f"[dim]{MEMORY_NOTE}[/dim]")
    console.print(f"[dim]{PAPER_NOTE}[/dim]")
    if profile.vision_split:
        console.print(f"[dim]{SPLIT_NOTE}[/dim]")


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print the ratios for people."""
    console = console or output()
    how = "in turns" if comparison.paired else "each when it was profiled: a drift of the machine is in here"
    console.print(f"A {escape(comparison.first)}\nB {escape(comparison.second)}\nrun {how}", soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("milliseconds")
    for name in ("A", "B", "B / A", "95 % interval", ""):
        table.add_column(name, justify="right")
    for ratio in comparison.ratios:
        interval = "" if ratio.interval is None else f"{ratio.interval[0]:.3f} to {ratio.interval[1]:.3f}"
        verdict = ("B faster" if ratio.ratio < 1 else "A faster") if ratio.certain else "no difference shown"
        name = _NAMES.get(ratio.stage, "to the first token").strip()
        table.add_row(
            f"{ratio.grid_mode}: {name}",
            f"{ratio.first * 1e3:,.1f}",
            f"{ratio.second * 1e3:,.1f}",
            f"{ratio.ratio:.3f}",
            interval,
            verdict,
        )
    console.print(table)


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
    for name in (*ours, "paper's\nlatency", "\nperiod", "\nmemory"):
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


def _rest(mode: ModeProfile) -> str:
    """Percentiles of a token, the cold start, and energy where the machine tells."""
    steps = ", ".join(f"{name} {value * 1e3:,.1f}" for name, value in mode.decode_percentiles.items())
    text = f"{mode.grid_mode}: a token {steps} ms"
    if mode.cold is not None:
        text += (
            f"; cold start: open {mode.cold.open_seconds:,.2f} s, first token after "
            f"{mode.cold.first_token_seconds:,.2f} s"
        )
    for source, joules in mode.joules.items():
        text += f"; {joules:,.1f} J an answer ({source})"
    return text


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
