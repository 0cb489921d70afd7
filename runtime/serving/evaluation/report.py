"""What `eval --data` tells: a table for people, the same facts as JSON for machines."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from uhd_export.runtime.serving.evaluation.evaluate import Comparison, Evaluation
from uhd_export.runtime.serving.evaluation.statistics import Estimate
from uhd_export.runtime.terminal.console import output
from uhd_export.runtime.terminal.text import cell

NAMES = {
    "exact": "exact match",
    "anls": "ANLS",
    "relaxed": "relaxed accuracy",
    "vqa": "VQA accuracy",
}


def describe(
    bundle: Path,
    evaluation: Evaluation,
    other_bundle: Path | None,
    other: Evaluation | None,
    comparison: Comparison | None,
) -> dict[str, Any]:
    """Everything, question by question, ready for JSON."""
    facts = {"bundle": str(bundle), **asdict(evaluation)}
    if other is not None and comparison is not None:
        facts |= {"other": {"bundle": str(other_bundle), **asdict(other)}, "comparison": asdict(comparison)}
    return facts


def show(
    bundle: Path,
    evaluation: Evaluation,
    other_bundle: Path | None,
    other: Evaluation | None,
    comparison: Comparison | None,
) -> None:
    """Print the averages with their intervals, and what differs between two bundles."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(f"{len(evaluation.questions)} questions")
    table.add_column("bundle")
    table.add_column("percent", justify="right")
    table.add_column("95 % interval", justify="right")
    for name, average in evaluation.measures.items():
        table.add_row(NAMES[name], cell(bundle.name), *_cells(average))
        if other is not None and comparison is not None and other_bundle is not None:
            table.add_row("", cell(other_bundle.name), *_cells(other.measures[name]))
            change = f"difference: {comparison.better[name]} better, {comparison.worse[name]} worse"
            table.add_row("", change, *_cells(comparison.difference[name], "+"), end_section=True)
    console = output()
    console.print(table)
    console.print("intervals: questions drawn again (bootstrap)", style="dim")
    if evaluation.failed:
        first = next(q for q in evaluation.questions if q.error)
        reason = cell(f"{first.where}: {first.error}")
        console.print(f"{evaluation.failed} not answered, counted as 0; the first, {reason}")


def _cells(estimate: Estimate, sign: str = "") -> tuple[str, str]:
    low, high = 100 * estimate.low, 100 * estimate.high
    return f"{100 * estimate.mean:{sign}.1f}", f"{low:{sign}.1f} to {high:{sign}.1f}"
