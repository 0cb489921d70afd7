"""A profile as one HTML page: no script, no network, dark or light as the reader has it."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from uhd_export.runtime.report import charts
from uhd_export.runtime.report.charts import NAMES, Facts, Spec
from uhd_export.runtime.terminal.quality_report import summary_lines
from uhd_export.runtime.units import format_bytes

_STYLE = Path(__file__).with_name("style.css")
# The browser itself refuses whatever would come from elsewhere.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def profile_page(facts: Facts) -> str:
    """The page of the profile `facts`. Raises UhdError where the library that draws is not installed."""
    title = f"{Path(facts['bundle']).name}: {facts['backend']}, {facts['machine']['processor']}"
    sections = [
        _figure(
            "Time to the first token",
            f"A {_size(facts)} image; median of {facts['repeats']} runs, quartiles of the whole as a line.",
            charts.stage_bars(facts),
        ),
        _figure("Beside the paper", facts["paper"]["note"], charts.beside_paper(facts)),
        _figure("Roofline", _roofline_note(facts), charts.roofline(facts)),
        _figure(
            "Memory over time",
            f"A fresh process that opens the bundle and answers once, {facts['modes'][0]['grid_mode']}.",
            charts.memory(facts),
        ),
        _figure(
            "Time by image size",
            "In one fresh process, sizes in growing order, the median of three runs after one.",
            charts.sweep_times(facts),
        ),
        _figure(
            "Memory by image size", "The peak of that process after each size.", charts.sweep_memory(facts)
        ),
        _figure(
            "Tokens by image size",
            "Counted: what an image adds to the prompt.",
            charts.tokens(facts),
        ),
        _section("Grid modes", _mode_table(facts), wide=True),
        _section("Stages", _stage_table(facts), wide=True),
        _section("Machine and versions", _machine_table(facts)),
        _section("Parity with PyTorch", _parity_table(facts)),
        _section("Quality of the quantized weights", _quality(facts)),
    ]
    warnings = "".join(f'<p class="warn">{escape(line)}</p>' for line in facts["warnings"])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE.read_text(encoding='utf-8')}</style></head><body>"
        f"<h1>{escape(title)}</h1><p>{escape(_summary(facts))}</p>{warnings}"
        f"<main>{''.join(sections)}</main></body></html>\n"
    )


def _size(facts: Facts) -> str:
    return f"{facts['size'][0]}x{facts['size'][1]}"


def _summary(facts: Facts) -> str:
    precision = facts["precision"]
    return (
        f"vision {precision['vision']}, language {precision['language']}; image {_size(facts)}: "
        f"{facts['crops']} crops, {facts['visual_tokens']} visual tokens, {facts['positions']} positions; "
        f"weights {format_bytes(facts['weight_bytes'])}, KV cache {format_bytes(facts['kv_bytes'])} of "
        f"{format_bytes(facts['kv_bytes_allocated'])} allocated"
    )


def _section(title: str, body: str, *, wide: bool = False) -> str:
    kind = ' class="wide"' if wide else ""
    return f"<section{kind}><h2>{escape(title)}</h2>{body}</section>"


def _figure(title: str, note: str, spec: Spec | None) -> str:
    drawn = "<p>Not measured here.</p>" if spec is None else charts.draw(spec)
    return _section(title, f"<p>{escape(note)}</p>{drawn}")


def _roofline_note(facts: Facts) -> str:
    rates = facts["rates"]
    if rates is None:
        return "The machine's rates are measured by ONNX Runtime, which is not what runs here."
    flops, moved = rates["flops_per_second"] / 1e9, rates["bytes_per_second"] / 1e9
    return (
        f"Measured: {flops:,.0f} GFLOP/s and {moved:,.1f} GB/s, by {rates['how']}. "
        f"Points are {facts['modes'][0]['grid_mode']}; those above the line move fewer bytes than counted, "
        "since caches and fusion keep them."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, text: bool = False) -> str:
    """Cells are escaped here; with `text`, they are words and not numbers."""
    kind = ' class="text"' if text else ""
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td{kind}>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{body}</table>"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.3g}" if seconds < 0.1 else f"{seconds * 1e3:,.0f}"


def _ends(ends: Sequence[float] | None) -> str:
    """Both ends of an interval; nothing where there is none, or one measurement alone."""
    return "" if ends is None or ends[0] == ends[1] else f"{_ms(ends[0])} to {_ms(ends[1])}"


def _stage_table(facts: Facts) -> str:
    rows = []
    for mode in facts["modes"]:
        for name, stage in mode["stages"].items():
            spread = stage["seconds"]
            counted = stage["flops"] is not None
            rows.append(
                (
                    f"{mode['grid_mode']}: {NAMES[name]}",
                    _ms(spread["median"]),
                    _ends((spread["low"], spread["high"])),
                    _ends(spread["interval"]),
                    f"{stage['flops'] / 1e9:,.3g}" if counted else "",
                    f"{stage['flops_per_second'] / 1e9:,.3g}" if counted else "",
                )
            )
    return _table(("", "ms", "quartiles", "95 % interval", "GFLOP", "GFLOP/s"), rows)


def _mode_table(facts: Facts) -> str:
    rows = []
    for mode in facts["modes"]:
        paper, cold = facts["paper"]["rows"][mode["grid_mode"]], mode["cold"]
        steps = mode["decode_percentiles"]
        energy = ", ".join(f"{value:,.1f} J {name}" for name, value in mode["joules"].items())
        rows.append(
            (
                mode["grid_mode"],
                _ms(mode["first_token"]["median"]),
                "" if cold is None else _ms(cold["open_seconds"]),
                "" if cold is None else _ms(cold["first_token_seconds"]),
                " / ".join(_ms(steps[name]) for name in ("p50", "p90", "p99")),
                f"{mode['tokens_per_second']:,.1f}",
                "" if mode["peak_bytes"] is None else format_bytes(mode["peak_bytes"]),
                energy or "not told",
                f"{paper['latency_seconds']:.2f} s",
            )
        )
    head = (
        "",
        "first token, ms",
        "cold: open, ms",
        "cold: first token, ms",
        "a token p50 / p90 / p99, ms",
        "tokens/s",
        "peak memory",
        "energy an answer",
        "paper's latency",
    )
    return _table(head, rows)


def _machine_table(facts: Facts) -> str:
    others = facts["others"]
    busy = "not known" if others is None else f"{others:.0%} of the processors, while measuring"
    rows = [*facts["machine"].items(), ("other work", busy), *facts["versions"].items()]
    return _table(("", ""), rows, text=True)


def _parity_table(facts: Facts) -> str:
    parity = facts["evidence"]["parity"]
    if not parity:
        return "<p>The bundle was built without measuring it.</p>"
    rows = [
        (
            f"{row['part']}, {row['metric']}: {row['inputs']}, against {row['against']}",
            row["skipped"] if row["value"] is None else f"{row['value']:.1e}",
            "" if row["limit"] is None else f"{row['limit']:.1e}",
        )
        for row in parity
    ]
    return _table(("", "built", "limit"), rows)


def _quality(facts: Facts) -> str:
    quality = facts["evidence"]["quality"]
    if quality is None:
        return "<p>The bundle's weights were not quantized here.</p>"
    return "".join(f"<p>{escape(line)}</p>" for line in summary_lines(quality))
