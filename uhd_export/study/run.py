"""One of the paper's tables: every row counted, and measured where this machine can in bounded time."""

from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from uhd_export.runtime.config import ModelConfig
from uhd_export.runtime.profiling.machine import OtherWork, machine, versions
from uhd_export.runtime.profiling.rates import measure_rates
from uhd_export.runtime.progress import Progress
from uhd_export.study.count import count_row
from uhd_export.study.measure import LanguageCut, language_cut, vision_engine, vision_seconds
from uhd_export.study.rows import SIZE, Row, study_rows

# A GEMM rate is of one product; a whole graph reaches about a third of it.
_EFFICIENCY = 1 / 3
_VISION = ("vit", "jbu", "projector")
# Of the language model: what a machine without a GPU holds and runs in seconds.
_LAYERS = 2
NOT_MEASURED = (
    "a whole first token is not measured: the language model ran with {layers} of its layers, and nothing is "
    "multiplied out; benchmarks/full_size.py runs all of them, in a quarter of an hour"
)


@dataclass(frozen=True)
class StudyOptions:
    """`repeats` 0 counts alone; no row is measured that would take over `limit` seconds a run."""

    repeats: int = 3
    limit: float = 120.0
    device: str | None = None
    threads: int | None = None


def run_study(
    study: str,
    model: str | ModelConfig = "Vicuna-7B",
    options: StudyOptions | None = None,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """The rows of `study` ready for JSON. Raises UhdError."""
    options = options or StudyOptions()
    device, others = options.device or "cpu", OtherWork()
    rates = measure_rates("onnxruntime", device, options.threads) if options.repeats else None
    rows, records = study_rows(study, model), []
    # Rows of one model share its graph.
    for _, group in groupby(rows, key=lambda row: (row.model, row.no_graph)):
        members = list(group)
        counts = [count_row(row) for row in members]
        reason = members[0].no_graph or _too_long(counts, rates, options)
        latencies: list[Any] = [None] * len(members)
        if reason is None:
            with vision_engine(members[0].model, threads=options.threads, device=options.device) as engine:
                latencies = [asdict(vision_seconds(engine, row, options.repeats)) for row in members]
        for row, counted, latency in zip(members, counts, latencies, strict=True):
            records.append(_record(row, counted, latency, reason))
            progress(len(records), len(rows) + 1)
    cut = _language_cut(rows, records, options)
    progress(len(rows) + 1, len(rows) + 1)
    return {
        "study": study,
        "model": model if isinstance(model, str) else "sizes given",
        "size": list(SIZE),
        "machine": machine(device, options.threads),
        "versions": versions(),
        "others": others.share(),
        "vision_seconds_of": "vision.onnx of the row, random weights, all crops of the image",
        "language_cut": cut and asdict(cut),
        "not_measured": NOT_MEASURED.format(layers=cut.layers if cut else "none"),
        "rows": records,
    }


def _language_cut(
    rows: list[Row], records: list[dict[str, Any]], options: StudyOptions
) -> LanguageCut | None:
    """Of the first row's language model, at the positions of its prompt; None where nothing is measured."""
    if options.repeats == 0 or all(row.no_graph for row in rows):
        return None
    return language_cut(
        rows[0].model,
        records[0]["positions"],
        options.repeats,
        layers=_LAYERS,
        threads=options.threads,
        device=options.device,
    )


def _too_long(counts: list[dict[str, Any]], rates: Any, options: StudyOptions) -> str | None:
    """Why a row is not measured; None where it may be."""
    if options.repeats == 0:
        return "not asked for"
    flops = max(sum(each["exported"]["stages"][name]["flops"] for name in _VISION) for each in counts)
    seconds = flops / (rates.flops_per_second * _EFFICIENCY) if rates is not None else 0.0
    if seconds > options.limit:
        return f"not measured: about {seconds:,.0f} s a run on this machine"
    return None


def _record(row: Row, counted: dict[str, Any], latency: Any, reason: str | None) -> dict[str, Any]:
    projector = row.model.projector
    return {
        "name": row.name,
        "encoder": row.encoder,
        "projector": projector.kind,
        "pyramid": projector.pyramid,
        "levels": list(projector.levels),
        "grid_mode": row.grid_mode,
        "layout": row.layout,
        "note": row.note,
        **counted,
        "vision_seconds": latency,
        "vision_seconds_missing": reason,
        "paper": dict(row.paper),
        "paper_measures": row.paper_note,
    }
