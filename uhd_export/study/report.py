"""A study as a table, the paper's figures beside ours."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from uhd_export.runtime.terminal.console import output


def print_study(facts: dict[str, Any], console: Console | None = None) -> None:
    """Print the facts of `run_study`."""
    console = console or output()
    machine = facts["machine"]
    console.print(
        f"{facts['study']} of the paper at {facts['size'][0]}x{facts['size'][1]}, {facts['model']}; "
        f"{machine['processor']}, {machine['threads']} threads, {machine['device']}",
        soft_wrap=True,
    )
    figures = sorted({name for row in facts["rows"] for name in row["paper"]})
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("\nrow")
    for name in ("TFLOP,\nas released", "hooked\nmodules", "as\nexported", "vision\nalone", "vision\ns"):
        table.add_column(name, justify="right")
    for name in figures:
        table.add_column(f"paper's\n{name}", justify="right")
    for row in facts["rows"]:
        vision = sum(row["exported"]["stages"][name]["flops"] for name in ("vit", "jbu", "projector"))
        seconds = row["vision_seconds"]
        table.add_row(
            row["name"],
            f"{row['released']['first_token']['flops'] / 1e12:.2f}",
            f"{row['hooked_flops'] / 1e12:.2f}",
            f"{row['exported']['first_token']['flops'] / 1e12:.2f}",
            f"{vision / 1e12:.2f}",
            "-" if seconds is None else f"{seconds['median']:.2f}",
            *(f"{row['paper'][name]:g}" if name in row["paper"] else "" for name in figures),
        )
    console.print(table)
    notes = [("paper", row["paper_measures"]) for row in facts["rows"]]
    notes += [(row["name"], row["note"]) for row in facts["rows"] if row["note"]]
    notes += [("vision s", row["vision_seconds_missing"]) for row in facts["rows"]]
    for name, note in dict.fromkeys(notes):
        if note:
            console.print(f"[dim]{name}: {note}[/dim]", soft_wrap=True)
    if cut := facts["language_cut"]:
        console.print(
            f"language model, {cut['layers']} of its {cut['of_layers']} layers, {cut['weights']}: "
            f"prefill of {cut['positions']} positions {cut['prefill']['median']:.2f} s, "
            f"a decoding step {1e3 * cut['decode']['median']:.0f} ms",
            soft_wrap=True,
        )
    console.print(f"[dim]{facts['not_measured']}[/dim]", soft_wrap=True)
