"""How the time of the vision part divides into ViT, JBU and Hiwin, from a trace of its engine."""

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from uhd_export.runtime.choices import BACKENDS
from uhd_export.runtime.engines.backends import open_engine

TRACED = BACKENDS
"""The backends whose traces this file reads."""
VISION_STAGES = ("vit", "jbu", "hiwin")
# Bodies of the custom ops, which ONNX Runtime inlines under names of its own.
_INLINED = {"_inlfunc_JBU": "jbu", "_inlfunc_WindowAttention": "hiwin"}

# The first run allocates as it goes, so that whichever stage touches new pages first seems slow. Several runs
# together have less noise than one.
_WARM_UPS, _RUNS = 1, 3

_NAMED = re.compile(rf"(?<!\w)({'|'.join(VISION_STAGES)})/")

Feeds = Mapping[str, NDArray[Any]]


def vision_shares(
    path: Path,
    batches: Sequence[Feeds],
    *,
    backend: str = "onnxruntime",
    device: str | None = None,
    threads: int | None = None,
) -> dict[str, float]:
    """Share of each stage (they sum to 1) in the graph or engine at `path`, run on `batches` in turn.

    A session of its own with profiling on runs everything `_WARM_UPS` times, then `_RUNS` times that count.
    Empty where an engine has fused stages together, so that its layers do not tell.
    """
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "vision"
        with open_engine(path, backend, device=device, threads=threads, profile=prefix) as engine:
            for _ in range(_WARM_UPS + _RUNS):
                for feeds in batches:
                    engine.infer(feeds)
            trace = engine.end_profile()
        shares = stage_shares(json.loads(trace.read_text(encoding="utf-8")), _RUNS * len(batches))
    return shares if shares.get(VISION_STAGES[-1]) else {}


def stage_shares(events: Sequence[Mapping[str, Any]], runs: int) -> dict[str, float]:
    """Share of each stage in the last `runs` runs of a trace's `events` (Chrome trace format).

    Nodes belong to the stage in their name. Those that graph optimizations made or renamed count with
    the node before them, because stages run one after another. Empty where a node names several stages.
    """
    starts = sorted(event["ts"] for event in events if event.get("name") == "model_run")
    nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    nodes = sorted((e for e in nodes if e["ts"] >= starts[-runs]), key=lambda e: e["ts"])
    totals = dict.fromkeys(VISION_STAGES, 0.0)
    stage = VISION_STAGES[0]
    for event in nodes:
        named = _stages(event["name"])
        if len(named) > 1:
            return {}
        stage = next(iter(named), stage)
        totals[stage] += event["dur"]
    whole = sum(totals.values()) or 1.0
    return {name: time / whole for name, time in totals.items()}


def _stages(name: str) -> set[str]:
    """The stages that a node's name tells; TensorRT joins the names of what it fuses."""
    named = set(_NAMED.findall(name))
    return named or {stage for mark, stage in _INLINED.items() if mark in name}
