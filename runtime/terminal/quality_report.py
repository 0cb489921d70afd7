"""How good a quantized language model is, as it was measured while quantizing, for people."""

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from uhd_export.runtime.bundle.manifest import QUALITY, QUALITY_CHART, Manifest
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.json_files import read_json
from uhd_export.runtime.terminal.console import output
from uhd_export.runtime.terminal.text import cell
from uhd_export.runtime.units import format_bytes

_WORST = 5


def print_quality(folder: Path, manifest: Manifest, console: Console | None = None) -> None:
    """Print the quality report of the bundle in `folder`; nothing where it has none. Raises UhdError."""
    if QUALITY not in manifest.files:
        return
    path = folder / QUALITY
    try:
        report = read_json(path, "quantize the checkpoint again")
        if not isinstance(report, dict):
            raise TypeError("no JSON object")
        lines, table = summary_lines(report), worst_linears(report)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise UhdError(f"{path}: not a quality report ({error}); quantize the checkpoint again") from None
    console = console or output()
    for line in lines:
        console.print(cell(line), highlight=False, soft_wrap=True)
    console.print(table)
    if QUALITY_CHART in manifest.files:
        console.print(f"by layer and module: {cell(folder / QUALITY_CHART)}", soft_wrap=True)


def summary_lines(report: dict[str, Any]) -> list[str]:
    """The report's means and whole-model figures, a line each."""
    rtn, gptq = report["mean_rtn_error"], report["mean_gptq_error"]
    less = f" ({1 - gptq / rtn:.0%} less)" if rtn else ""
    lines = [
        f"GPTQ on {report['calibration_tokens']:,} tokens, judged on {report['held_out_tokens']:,} held-out "
        f"ones; linear layers {format_bytes(report['bytes_before'])} before, "
        f"{format_bytes(report['bytes_after'])} after",
        f"mean relative output error of a layer: rounded to nearest {rtn:.2e}, GPTQ {gptq:.2e}{less}",
    ]
    labels = {"rtn": "rounded to nearest", "gptq": "GPTQ"}
    if report.get("int8_head") is not None:
        labels["int8_head"] = "GPTQ and an int8 head"
    for name, label in labels.items():
        model = report[name]
        lines.append(
            f"whole model, {label}: KL divergence {model['kl']:.2e}, same likeliest token at "
            f"{model['agreement']:.1%} of {model['tokens']} generated tokens"
        )
    if report["accuracy"] is not None:
        questions = report["accuracy"]["questions"]
        exact = (f"{name} {count / questions:.1%}" for name, count in report["accuracy"]["exact"].items())
        lines.append(f"exact answers of {questions} questions: {', '.join(exact)}")
    fallbacks = report["fallbacks"]
    lines.append(f"rounded instead of GPTQ: {'; '.join(fallbacks) if fallbacks else 'none'}")
    return lines


def worst_linears(report: dict[str, Any]) -> Table:
    """The layers with the largest error after GPTQ."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(f"largest errors of {len(report['linears'])} linear layers", overflow="fold")
    for name in ("samples", "rounded", "GPTQ"):
        table.add_column(name, justify="right")
    for linear in sorted(report["linears"], key=lambda one: -one["gptq_error"])[:_WORST]:
        table.add_row(
            cell(f"layers.{linear['layer']}.{linear['module']}"),
            f"{linear['samples']:,}",
            f"{linear['rtn_error']:.2e}",
            f"{linear['gptq_error']:.2e}",
        )
    return table
