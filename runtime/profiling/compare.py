"""Two profiles side by side: ratios, and how far they can be trusted."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.pipeline import open_chunked
from uhd_export.runtime.profiling.facts import read_profile, whole
from uhd_export.runtime.profiling.profiler import ProfileOptions
from uhd_export.runtime.profiling.runs import FIRST_TOKEN, question_sequences, run_once
from uhd_export.runtime.profiling.spread import Spread, is_steady
from uhd_export.runtime.progress import Progress

_RESAMPLES = 2000
_WARM_UPS = 5
Samples = dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Ratio:
    """Seconds of B over seconds of A for one stage: below 1, B is faster.

    `interval` is the 95 % interval of the ratio, None with fewer than three runs; `certain` says that it
    leaves 1 out.
    """

    grid_mode: str
    stage: str
    first: float
    second: float
    ratio: float
    interval: tuple[float, float] | None

    @property
    def certain(self) -> bool:
        """Whether the difference is more than chance."""
        return self.interval is not None and not self.interval[0] <= 1 <= self.interval[1]


@dataclass(frozen=True)
class Comparison:
    """`paired`: both ran in turns, so that a drift of the machine cancels; else each had its own day."""

    first: str
    second: str
    paired: bool
    ratios: tuple[Ratio, ...]


def compare(
    first: Path, second: Path, options: ProfileOptions, progress: Progress = lambda done, total: None
) -> Comparison:
    """Two bundles, which run in turns, or two files that `profile --json` wrote. Raises UhdError."""
    if first.is_dir() and second.is_dir():
        samples = _run_in_turns((first, second), options, progress)
    elif first.is_dir() or second.is_dir():
        raise UhdError(f"compare {first} {second}: one is a bundle, one is not; give two of a kind")
    else:
        with whole(first, second):
            return _compared(first, second, _of_files(first, second), paired=False)
    return _compared(first, second, samples, paired=True)


def _compared(
    first: Path, second: Path, samples: dict[str, tuple[Samples, Samples]], *, paired: bool
) -> Comparison:
    ratios = []
    for mode, (ours, theirs) in samples.items():
        for stage in (*FIRST_TOKEN, "first_token", "decode"):
            ratios.append(_ratio(mode, stage, ours[stage], theirs[stage], paired=paired))
    return Comparison(str(first), str(second), paired, tuple(ratios))


def _ratio(mode: str, stage: str, first: Sequence[float], second: Sequence[float], *, paired: bool) -> Ratio:
    a, b = np.asarray(first), np.asarray(second)
    random = np.random.default_rng(0)
    if paired:  # of each turn its own ratio
        ratio = float(np.median(b / a))
        draws = np.median(random.choice(b / a, (_RESAMPLES, len(a))), axis=1)
    else:
        ratio = float(np.median(b) / np.median(a))
        medians = [np.median(random.choice(each, (_RESAMPLES, len(each))), axis=1) for each in (a, b)]
        draws = medians[1] / medians[0]
    low, high = np.percentile(draws, [2.5, 97.5])
    interval = (float(low), float(high)) if min(len(a), len(b)) > 2 else None
    return Ratio(mode, stage, float(np.median(a)), float(np.median(b)), ratio, interval)


def _run_in_turns(
    bundles: Sequence[Path], options: ProfileOptions, progress: Progress
) -> dict[str, tuple[Samples, Samples]]:
    """Samples by grid mode: each turn runs A and B, and the next one B and A."""
    with ExitStack() as stack:
        pipelines = [
            stack.enter_context(
                open_chunked(
                    path,
                    device=options.device,
                    threads=options.threads,
                    context=options.context,
                    prefill_chunk=options.chunk,
                )
            )
            for path in bundles
        ]
        found: dict[str, tuple[Samples, Samples]] = {}
        total = len(options.grid_modes) * options.repeats
        for index, mode in enumerate(options.grid_modes):
            both = []
            for pipeline in pipelines:
                (sequence,) = question_sequences(pipeline, options.size, [mode], options.tokens).values()
                warm: list[float] = []
                while not is_steady(warm) and len(warm) < _WARM_UPS:
                    warm.append(run_once(pipeline, sequence, options.tokens).first_token)
                both.append((pipeline, sequence))
            runs: list[list[Mapping[str, float]]] = [[], []]
            for turn in range(options.repeats):
                for which in (0, 1) if turn % 2 == 0 else (1, 0):
                    run = run_once(*both[which], options.tokens)
                    steps = Spread.of(run.steps).median
                    times = {name: run.seconds(name) for name in FIRST_TOKEN}
                    runs[which].append({**times, "first_token": run.first_token, "decode": steps})
                progress(index * options.repeats + turn + 1, total)
            first, second = ({name: tuple(r[name] for r in each) for name in each[0]} for each in runs)
            found[mode] = (first, second)
    return found


def _of_files(first: Path, second: Path) -> dict[str, tuple[Samples, Samples]]:
    facts = [read_profile(path) for path in (first, second)]
    for field in ("size", "new_tokens"):
        if facts[0][field] != facts[1][field]:
            raise UhdError(
                f"compare {first} {second}: {field} {facts[0][field]} differs from {facts[1][field]}; "
                "profile both alike"
            )
    modes = [{mode["grid_mode"]: mode for mode in each["modes"]} for each in facts]
    common = [mode for mode in modes[0] if mode in modes[1]]
    if not common:
        raise UhdError(f"compare {first} {second}: no grid mode in common; profile both alike")
    return {mode: (_samples(modes[0][mode]), _samples(modes[1][mode])) for mode in common}


def _samples(mode: dict[str, Any]) -> Samples:
    stages = {name: tuple(mode["stages"][name]["seconds"]["samples"]) for name in (*FIRST_TOKEN, "decode")}
    found = stages | {"first_token": tuple(mode["first_token"]["samples"])}
    if not all(found.values()):
        raise ValueError("a stage without samples")
    return found
