"""Measurements in a process of their own: starting cold, memory over time, a sweep over image sizes.

Engines keep what earlier images needed, so what one image takes shows only where nothing ran before.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from uhd_export.runtime.image.slicing import Size
from uhd_export.runtime.memory import available_memory, peak_memory, resident_memory, run_apart
from uhd_export.runtime.pipeline import open_chunked
from uhd_export.runtime.profiling.runs import Run, planned_image, question_sequences, run_once
from uhd_export.runtime.typed_json import read

_PERIOD = 0.005
_POINTS = 400
# No slices, then ever more of them; in growing order, so that a peak is that of its own size.
SWEEP: tuple[Size, ...] = ((336, 336), (672, 336), (672, 672), (1008, 672), (1008, 1008))
_SWEEP_RUNS = 3


@dataclass(frozen=True)
class StageSpan:
    """A stage of a cold answer, in seconds since the process began to open the bundle."""

    name: str
    start: float
    stop: float


@dataclass(frozen=True)
class ColdStart:
    """The first answer of a fresh process: opening, first token, and resident memory on the way.

    `memory` holds (seconds, bytes) since the bundle began to be opened. The files are in the system's cache.
    """

    open_seconds: float
    first_token_seconds: float
    spans: tuple[StageSpan, ...]
    memory: tuple[tuple[float, int], ...]
    peak_bytes: int | None


@dataclass(frozen=True)
class SweepPoint:
    """One image size: seconds by stage (the median of a few runs), and the process's peak so far."""

    size: Size
    crops: int
    visual_tokens: int
    seconds: dict[str, float]
    peak_bytes: int | None


def fits_apart(device: str) -> bool:
    """Whether another process may open the bundle: not onto a GPU, and not where memory has no room."""
    room, needed = available_memory(), peak_memory()
    return device == "cpu" and not (room is not None and needed is not None and room < needed)


def cold_start(bundle: str, size: Size, new_tokens: int, **opening: Any) -> ColdStart | None:
    """One answer of a fresh process; None where it could not run. `opening` is as in `open_chunked`."""
    done = run_apart(answer_cold, bundle=bundle, size=size, new_tokens=new_tokens, **opening)
    if done is None:
        return None
    return read(ColdStart, {**done.result, "peak_bytes": done.peak_bytes}, "cold start")


def sweep(bundle: str, sizes: Sequence[Size], new_tokens: int, **opening: Any) -> tuple[SweepPoint, ...]:
    """Every size in turn, in one fresh process; those that do not fit the context are left out."""
    done = run_apart(answer_sizes, bundle=bundle, sizes=sizes, new_tokens=new_tokens, **opening)
    if done is None:
        return ()
    return tuple(read(SweepPoint, point, "sweep") for point in done.result)


def answer_cold(bundle: str, size: Size, new_tokens: int, **opening: Any) -> dict[str, Any]:
    """See `cold_start`; what it returns is ready for JSON."""
    with _Memory() as memory:
        start = time.perf_counter()
        with open_chunked(bundle, **opening) as pipeline:
            opened = time.perf_counter()
            mode = pipeline.settings.grid_mode
            (sequence,) = question_sequences(pipeline, size, [mode], new_tokens).values()
            run = run_once(pipeline, sequence, new_tokens)
    spans = [("open", start, opened), *_stages(run)]
    return {
        "open_seconds": opened - start,
        "first_token_seconds": opened - start + run.first_token,
        "spans": [{"name": n, "start": b - start, "stop": e - start} for n, b, e in spans],
        "memory": [[seconds - start, size] for seconds, size in memory.thinned()],
    }


def _stages(run: Run) -> list[tuple[str, float, float]]:
    """From the first span to the last of each stage."""
    names = [name for name in dict.fromkeys(span.name for span in run.spans) if name != "sampling"]
    parts = {name: [span for span in run.spans if span.name == name] for name in names}
    return [(name, spans[0].start, spans[-1].stop) for name, spans in parts.items()]


def answer_sizes(
    bundle: str, sizes: Sequence[Sequence[int]], new_tokens: int, **opening: Any
) -> list[dict[str, Any]]:
    """See `sweep`; what it returns is ready for JSON."""
    points = []
    with open_chunked(bundle, **opening) as pipeline:
        mode, context = pipeline.settings.grid_mode, pipeline.generator.decoder.context
        for width, height in sizes:
            (sequence,) = question_sequences(pipeline, (width, height), [mode], 0).values()
            if len(sequence) + new_tokens > context:
                continue
            run_once(pipeline, sequence, new_tokens)
            runs = [run_once(pipeline, sequence, new_tokens) for _ in range(_SWEEP_RUNS)]
            seconds = {name: _middle([run.seconds(name) for run in runs]) for name, _, _ in _stages(runs[0])}
            planned = planned_image(sequence)
            points.append(
                {
                    "size": [width, height],
                    "crops": len(planned.plan.crop_sizes),
                    "visual_tokens": len(planned),
                    "seconds": seconds | {"decode": seconds["decode"] / new_tokens},
                    "peak_bytes": peak_memory(),
                }
            )
    return points


def _middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


class _Memory:
    """Resident memory of this process, read again and again by a thread of its own."""

    def __init__(self) -> None:
        self._points: list[tuple[float, int]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._done.wait(_PERIOD):
            size = resident_memory()
            if size is not None:
                self._points.append((time.perf_counter(), size))

    def thinned(self) -> list[tuple[float, int]]:
        """The points, a few hundred at most: of each group of neighbours the largest."""
        every = -(-len(self._points) // _POINTS) or 1
        groups = (self._points[i : i + every] for i in range(0, len(self._points), every))
        return [max(group, key=lambda point: point[1]) for group in groups]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
