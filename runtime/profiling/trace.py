"""One answer on one time line: our stages above, the engines' own node times below them.

The form is Chrome's trace events, which Perfetto (ui.perfetto.dev) and chrome://tracing open.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uhd_export.runtime.bundle.manifest import part_files
from uhd_export.runtime.engines.backends import default_device, open_engine
from uhd_export.runtime.files import write_file
from uhd_export.runtime.pipeline import Pipeline
from uhd_export.runtime.profiling.machine import machine, versions
from uhd_export.runtime.profiling.profiler import ProfileOptions
from uhd_export.runtime.profiling.runs import Run, Span, question_sequences, run_once

Event = dict[str, Any]
# One process, a thread for each row of the picture.
_STAGES, _PARTS = 1, {"vision": 2, "language": 3}
_ENGINE_OF = {"vision": "vision", "prefill": "language", "decode": "language"}


def write_trace(pipeline: Pipeline, options: ProfileOptions, path: Path) -> None:
    """Write a trace of one answer in the first of the options' grid modes to `path`.

    Engines of their own run it, which note the time of every node: an answer takes somewhat longer so. A run
    before it warms up and is not shown. Raises UhdError where the backend leaves no trace.
    """
    manifest, (mode, *_) = pipeline.manifest, options.grid_modes
    with tempfile.TemporaryDirectory() as folder:
        names = dict(zip(_PARTS, part_files(manifest.backend), strict=True))
        engines = {
            part: open_engine(
                pipeline.folder / name,
                manifest.backend,
                device=options.device,
                threads=options.threads,
                profile=Path(folder) / part,
            )
            for part, name in names.items()
        }
        context = pipeline.generator.decoder.context
        with Pipeline(
            pipeline.folder, manifest, engines["vision"], engines["language"], context=context
        ) as traced:
            traced.settings = pipeline.settings
            traced.generator.prefix.chunk = pipeline.generator.prefix.chunk
            (sequence,) = question_sequences(traced, options.size, [mode], options.tokens).values()
            runs = [run_once(traced, sequence, options.tokens) for _ in range(2)]
            noted = {
                part: json.loads(engine.end_profile().read_text(encoding="utf-8"))
                for part, engine in engines.items()
            }
    events = trace_events(runs[-1], noted)
    facts = {
        "bundle": str(pipeline.folder),
        "grid_mode": mode,
        **machine(options.device or default_device(manifest.backend), options.threads),
        **versions(),
    }
    write_file(path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms", "otherData": facts}))


def trace_events(run: Run, noted: dict[str, Sequence[Event]]) -> list[Event]:
    """Complete events of `run`'s spans and, inside those that ran an engine, of the nodes that it noted.

    `noted` holds each part's own trace, whose clock starts anywhere: its last runs are those of `run`, in
    order, and each is put into the middle of its span.
    """
    start = min(span.start for span in run.spans)
    events = [_name("process_name", 0, "uhd-export"), _name("thread_name", _STAGES, "stages")]
    for span in sorted(run.spans, key=lambda each: (each.start, -each.stop)):
        name = f"{span.name}: {span.detail}" if span.detail else span.name
        events.append(_complete(name, span.name, _STAGES, (span.start - start) * 1e6, span.seconds * 1e6))
    for part, row in _PARTS.items():
        spans = [span for span in run.spans if _ENGINE_OF.get(span.name) == part]
        events.append(_name("thread_name", row, f"{part} engine"))
        if part in noted and spans:
            events += _nodes(spans, noted[part], row, start)
    return events


def _nodes(spans: Sequence[Span], noted: Sequence[Event], row: int, start: float) -> list[Event]:
    runs = sorted((e for e in noted if e.get("name") == "model_run"), key=lambda e: e["ts"])[-len(spans) :]
    nodes = [e for e in noted if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    events = []
    for span, whole in zip(spans, runs, strict=True):
        offset = (span.start - start) * 1e6 + (span.seconds * 1e6 - whole["dur"]) / 2 - whole["ts"]
        end = whole["ts"] + whole["dur"]
        for node in nodes:
            if whole["ts"] <= node["ts"] <= end:
                name = node["name"].removesuffix("_kernel_time")
                kind = node.get("args", {}).get("op_name") or "node"
                events.append(_complete(name, kind, row, node["ts"] + offset, node["dur"]))
    return sorted(events, key=lambda event: event["ts"])


def _complete(name: str, category: str, row: int, start: float, duration: float) -> Event:
    return {"name": name, "cat": category, "ph": "X", "pid": 1, "tid": row, "ts": start, "dur": duration}


def _name(kind: str, row: int, name: str) -> Event:
    return {"name": kind, "ph": "M", "pid": 1, "tid": row, "ts": 0, "args": {"name": name}}
