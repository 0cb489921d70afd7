"""What the command line prints of an answer's memory and time."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from uhd_export.runtime.terminal.console import output
from uhd_export.runtime.terminal.text import cell
from uhd_export.runtime.units import format_bytes


def print_memory(facts: dict[str, Any], console: Console | None = None) -> None:
    """Print the facts of an answer's plan as a table and a verdict."""
    console = console or output()
    build = "" if facts["build"] is None else f", as built with {facts['build']},"
    title = f"an answer of {facts['model']}{build} on {facts['device']}"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    console.print(cell(title), style="italic", soft_wrap=True)  # longer than the table
    table.add_column("memory")
    table.add_column("", justify="right")
    for name, size in facts["bytes"].items():
        if name.startswith("cache"):
            name += f", {facts['positions' if name.endswith('used') else 'context']} positions"
        table.add_row(name, format_bytes(size))
    table.add_section()
    for stage, size in facts["stages"].items():
        table.add_row(f"peak of {stage}", format_bytes(size))
    console.print(table)
    disk = f"disk {format_bytes(facts['disk'])}"
    if facts.get("calibration") is not None:
        disk += f"; calibrating it takes {format_bytes(facts['calibration'])} of memory"
    console.print(disk, soft_wrap=True)
    if facts["seconds"]:
        stages = ", ".join(f"{stage} {_seconds(value)}" for stage, value in facts["seconds"].items())
        console.print(f"{stages} a token; {facts['seconds_are']}", soft_wrap=True)
    console.print(verdict(facts), soft_wrap=True)


def verdict(facts: dict[str, Any]) -> str:
    """Whether it fits, in one line."""
    peak = f"peak {format_bytes(facts['peak'])} in {facts['peak_stage']}"
    if facts["available"] is None:
        return f"{peak}; what is available is not known"
    available = format_bytes(facts["available"])
    if facts["fits"]:
        return f"{peak}: fits into {available}"
    return f"{peak}: does not fit into {available}; use {', or '.join(facts['remedies'])}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.1f} ms"
