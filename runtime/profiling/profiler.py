"""The profiler: where the time of one answer goes, by stage and grid mode, and what it takes in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from uhd_export.runtime.bundle.manifest import part_files
from uhd_export.runtime.choices import GRID_MODES
from uhd_export.runtime.engines.backends import default_device
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.pixels import cut
from uhd_export.runtime.image.slicing import Size
from uhd_export.runtime.language.sequence import PromptSequence
from uhd_export.runtime.pipeline import Pipeline
from uhd_export.runtime.profiling.apart import SWEEP, ColdStart, SweepPoint, cold_start, fits_apart, sweep
from uhd_export.runtime.profiling.energy import EnergyMeter
from uhd_export.runtime.profiling.evidence import TokenPoint, bundle_evidence, token_points
from uhd_export.runtime.profiling.machine import OtherWork, machine, versions
from uhd_export.runtime.profiling.rates import Rates, measure_rates
from uhd_export.runtime.profiling.runs import (
    FIRST_TOKEN,
    Run,
    planned_image,
    question_sequences,
    run_once,
)
from uhd_export.runtime.profiling.spread import Spread, is_steady, percentiles
from uhd_export.runtime.profiling.stages import TRACED, VISION_STAGES, vision_shares
from uhd_export.runtime.profiling.work import Work, stage_work, stored_types
from uhd_export.runtime.progress import Progress

MOST_WARM_UPS = 5


@dataclass(frozen=True)
class ProfileOptions:
    """What to measure: `repeats` runs of each of `grid_modes`, `tokens` decoded in each.

    `device` and `threads` are those that the pipeline was opened with; traces and cold starts open the bundle
    again. `sweep` measures images of several sizes as well. `context` and `chunk`, positions of the cache
    and of a prompt's run, are of pipelines that a comparison opens; others have their own.
    """

    size: Size
    grid_modes: tuple[str, ...] = GRID_MODES
    repeats: int = 5
    tokens: int = 16
    device: str | None = None
    threads: int | None = None
    sweep: bool = False
    context: int | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        """Raise UhdError where nothing would be measured."""
        if self.repeats < 1 or self.tokens < 1:
            raise UhdError(f"profile: {self.repeats} repeats of {self.tokens} tokens; use at least 1 of each")


@dataclass(frozen=True)
class StageProfile:
    """One stage: seconds, and the FLOPs it does and bytes it moves at most (None where not counted)."""

    seconds: Spread
    flops: int | None
    bytes: int | None = None

    @property
    def flops_per_second(self) -> float | None:
        """Achieved rate at the median."""
        return None if self.flops is None else self.flops / self.seconds.median


@dataclass(frozen=True)
class ModeProfile:
    """One grid mode: "vit", "jbu" and "hiwin" are parts of "vision", and "decode" is one token.

    `first_token` runs from the opened image to the first token. `cold` is a process that only opens the
    bundle and answers in this mode, None where not measured. `joules` are of one answer, by source.
    """

    grid_mode: str
    stages: dict[str, StageProfile]
    first_token: Spread
    decode_percentiles: dict[str, float]
    warm_ups: int
    cold: ColdStart | None
    joules: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """Decoded at the median."""
        return 1 / self.stages["decode"].seconds.median

    @property
    def peak_bytes(self) -> int | None:
        """The most resident memory of a process that answers once."""
        return None if self.cold is None else self.cold.peak_bytes


@dataclass(frozen=True)
class EngineMemory:
    """Device memory of one engine, in bytes, as it tells itself.

    `used_bytes` is what these runs needed beside weights and KV cache; `most_scratch_bytes`, where the
    engine knows, what activations take at the largest shapes. Engines share the memory of activations.
    """

    weight_bytes: int | None
    used_bytes: int
    most_scratch_bytes: int | None


@dataclass(frozen=True)
class Profile:
    """What `profile_pipeline` measured, and on what.

    `others` is the share of the machine's processors that was busy with something else meanwhile.
    """

    bundle: str
    machine: dict[str, str]
    versions: dict[str, str]
    rates: Rates | None
    others: float | None
    backend: str
    precision: dict[str, str]
    size: Size
    crops: int
    visual_tokens: int
    positions: int
    repeats: int
    new_tokens: int
    weight_bytes: int
    kv_bytes: int
    kv_bytes_allocated: int
    vision_split: bool
    engines: dict[str, EngineMemory]
    modes: tuple[ModeProfile, ...]
    sweep: tuple[SweepPoint, ...]
    token_points: tuple[TokenPoint, ...]
    evidence: dict[str, Any]


def profile_pipeline(
    pipeline: Pipeline, options: ProfileOptions, progress: Progress = lambda done, total: None
) -> Profile:
    """Time one question about a test image in each grid mode.

    Each mode warms up until a run is hardly faster than the one before, then runs in turn with the others, so
    that a machine that slows down slows all of them. The time of the vision graph is divided into its stages
    by a trace from a session of its own.
    """
    device = options.device or default_device(pipeline.manifest.backend)
    others, steps = OtherWork(), _Steps(options, progress)
    sequences = question_sequences(pipeline, options.size, options.grid_modes, options.tokens)
    warm = {mode: _warm_up(pipeline, sequence, options, steps) for mode, sequence in sequences.items()}
    measured: dict[str, list[Run]] = {mode: [] for mode in sequences}
    joules: dict[str, dict[str, float]] = {mode: {} for mode in sequences}
    for _ in range(options.repeats):
        for mode, sequence in sequences.items():
            with EnergyMeter(device) as meter:
                measured[mode].append(run_once(pipeline, sequence, options.tokens))
            for source, amount in meter.joules.items():
                joules[mode][source] = joules[mode].get(source, 0.0) + amount / options.repeats
            steps.advance()
    busy = others.share()
    opening = _opening(pipeline, options, device)
    modes = []
    for mode, sequence in sequences.items():
        apart = fits_apart(device)
        cold = (
            cold_start(str(pipeline.folder), options.size, options.tokens, **{**opening, "grid_mode": mode})
            if apart
            else None
        )
        shares = _vision_shares(pipeline, sequence, device=device, threads=options.threads)
        summary = _summarise(pipeline, sequence, measured[mode], shares)
        modes.append(ModeProfile(mode, *summary, warm[mode], cold, joules[mode]))
        steps.advance()
    points: tuple[SweepPoint, ...] = ()
    if options.sweep and fits_apart(device):
        points = sweep(str(pipeline.folder), SWEEP, options.tokens, **opening)
        steps.advance()
    manifest, cache = pipeline.manifest, pipeline.generator.decoder
    planned = planned_image(sequence)
    return Profile(
        bundle=str(pipeline.folder),
        machine=machine(device, options.threads),
        versions=versions(),
        rates=measure_rates(manifest.backend, device, options.threads),
        others=busy,
        backend=manifest.backend,
        precision=stored_types(manifest),
        size=options.size,
        crops=len(planned.plan.crop_sizes),
        visual_tokens=len(planned),
        positions=len(sequence),
        repeats=options.repeats,
        new_tokens=options.tokens,
        weight_bytes=sum(r.bytes for name, r in manifest.files.items() if name.split(".")[-1] in _WEIGHTS),
        kv_bytes=round(cache.kv_bytes * len(sequence) / cache.context),
        kv_bytes_allocated=cache.kv_bytes,
        vision_split=all(VISION_STAGES[0] in mode.stages for mode in modes),
        engines=_engines(pipeline),
        modes=tuple(modes),
        sweep=points,
        token_points=token_points(
            pipeline.settings, side=manifest.model.projector.side, patch=manifest.model.vision.patch
        ),
        evidence=bundle_evidence(pipeline.folder, manifest),
    )


_WEIGHTS = ("onnx", "data", "engine", "npy")


class _Steps:
    """How far the profile is: runs, counted with the warm-ups that a mode needs at least."""

    def __init__(self, options: ProfileOptions, progress: Progress) -> None:
        modes = len(options.grid_modes)
        self._done, self._total = 0, modes * (options.repeats + 3) + options.sweep
        self._progress = progress

    def advance(self, *, unforeseen: bool = False) -> None:
        """One more step is done."""
        self._done, self._total = self._done + 1, self._total + unforeseen
        self._progress(self._done, self._total)


def _warm_up(pipeline: Pipeline, sequence: PromptSequence, options: ProfileOptions, steps: _Steps) -> int:
    """Run until steady; the number of runs."""
    seconds: list[float] = []
    while not is_steady(seconds) and len(seconds) < MOST_WARM_UPS:
        seconds.append(run_once(pipeline, sequence, options.tokens).first_token)
        steps.advance(unforeseen=len(seconds) > 2)
    return len(seconds)


def _opening(pipeline: Pipeline, options: ProfileOptions, device: str) -> dict[str, Any]:
    """How another process opens the same pipeline; see `open_chunked`."""
    settings = pipeline.settings
    return {
        "device": device,
        "threads": options.threads,
        "context": pipeline.generator.decoder.context,
        "prefill_chunk": pipeline.generator.prefix.chunk,
        "grid_mode": settings.grid_mode,
        "max_slices": settings.max_slices,
        "resize": settings.resize,
    }


def _engines(pipeline: Pipeline) -> dict[str, EngineMemory]:
    """Device memory by part; empty where a backend does not tell."""
    parts = {"vision": pipeline.vision, "language": pipeline.language}
    return {
        name: EngineMemory(engine.weight_bytes, engine.device_bytes, engine.most_scratch_bytes)
        for name, engine in parts.items()
        if engine.device_bytes is not None
    }


def _vision_shares(
    pipeline: Pipeline, sequence: PromptSequence, *, device: str, threads: int | None
) -> dict[str, float]:
    """How the vision graph's time divides into stages; empty where the backend leaves no trace."""
    backend = pipeline.manifest.backend
    if backend not in TRACED:
        return {}
    planned = planned_image(sequence)
    batches = pipeline.encoder.batches(cut(planned.image, planned.plan), planned.grid_mode)
    feeds = [feeds for _, feeds in batches]
    path = pipeline.folder / part_files(backend)[0]
    return vision_shares(path, feeds, backend=backend, device=device, threads=threads)


def _summarise(
    pipeline: Pipeline, sequence: PromptSequence, runs: Sequence[Run], shares: Mapping[str, float]
) -> tuple[dict[str, StageProfile], Spread, dict[str, float]]:
    """Stages, time to the first token and percentiles of the decode steps of one mode's runs."""
    planned = planned_image(sequence)
    seconds = {name: Spread.of([run.seconds(name) for run in runs]) for name in FIRST_TOKEN}
    steps = [step for run in runs for step in run.steps]
    work = stage_work(planned.plan.patch_grids, pipeline.manifest, len(sequence), planned.grid_mode)
    stages = {"pixels": StageProfile(seconds["pixels"], None)}
    stages["vision"] = _stage(seconds["vision"], work["vision"])
    for stage, share in shares.items():
        if share > 0:
            # One figure without a spread: that of the whole says nothing of the shares.
            stages[stage] = _stage(Spread.of([seconds["vision"].median * share]), work[stage])
    stages["prefill"] = _stage(seconds["prefill"], work["prefill"])
    stages["decode"] = _stage(Spread.of(steps), work["decode"])
    return stages, Spread.of([run.first_token for run in runs]), percentiles(steps)


def _stage(seconds: Spread, work: Work) -> StageProfile:
    return StageProfile(seconds, work.flops, work.bytes)
