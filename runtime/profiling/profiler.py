"""The profiler: where the time of one answer goes, by stage and grid mode, and what it takes in memory."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uhd_export.runtime.bundle.manifest import Manifest, part_files
from uhd_export.runtime.choices import GRID_MODES
from uhd_export.runtime.engines.backends import default_device
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.encoder import TOKENS
from uhd_export.runtime.image.pattern import pattern
from uhd_export.runtime.image.pixels import cut
from uhd_export.runtime.image.slicing import Size
from uhd_export.runtime.language import prompt as prompts
from uhd_export.runtime.language.sampling import greedy
from uhd_export.runtime.language.sequence import PlannedImage, PromptSequence
from uhd_export.runtime.memory import available_memory, peak_apart, peak_memory
from uhd_export.runtime.pipeline import Pipeline
from uhd_export.runtime.profiling import costs as flops
from uhd_export.runtime.profiling.costs import Grid
from uhd_export.runtime.profiling.machine import machine
from uhd_export.runtime.profiling.stages import TRACED, VISION_STAGES, vision_shares

QUESTION = "What is shown in this image?"


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements, in seconds."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(samples: Sequence[float]) -> "Spread":
        """Of `samples`; with one sample all three are equal."""
        if len(samples) == 1:
            return Spread(samples[0], samples[0], samples[0])
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return Spread(median, low, high)


@dataclass(frozen=True)
class StageProfile:
    """One stage: seconds, and the FLOPs it does (None where they are not counted)."""

    seconds: Spread
    flops: int | None

    @property
    def flops_per_second(self) -> float | None:
        """Achieved rate at the median."""
        return None if self.flops is None else self.flops / self.seconds.median


@dataclass(frozen=True)
class ModeProfile:
    """One grid mode: "vit", "jbu" and "hiwin" are parts of "vision", and "decode" is one token.

    `first_token` runs from the opened image to the first token. `peak_bytes` is the most resident memory of
    a process that only opens the bundle and answers in this mode, None where not measured: see `_peak`.
    """

    grid_mode: str
    stages: dict[str, StageProfile]
    first_token: Spread
    tokens_per_second: float
    peak_bytes: int | None


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
    """What `profile_pipeline` measured, and on what."""

    bundle: str
    machine: dict[str, str]
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


def profile_pipeline(
    pipeline: Pipeline,
    size: Size,
    *,
    grid_modes: Sequence[str] = GRID_MODES,
    repeats: int = 5,
    new_tokens: int = 16,
    device: str | None = None,
    threads: int | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Profile:
    """Time one question about a test image of `size` (width, height) in each grid mode.

    Each mode runs once to warm up and `repeats` times for the figures, in turn with the others, so that
    a machine that slows down slows all of them; `new_tokens` are decoded each time, whatever they are.
    `on_step` is called after every run (see `steps`). The time of the vision graph is divided into its
    stages by a trace from a session of its own on `device` with `threads`.
    """
    device = device or default_device(pipeline.manifest.backend)
    if repeats < 1 or new_tokens < 1:
        raise UhdError(f"profile: {repeats} repeats of {new_tokens} tokens; use at least 1 of each")
    sequences = _sequences(pipeline, size, grid_modes, new_tokens)
    for sequence in sequences.values():
        _run_once(pipeline, sequence, new_tokens)
        on_step()
    peaks: dict[str, int | None] = {}
    runs: dict[str, list[dict[str, Any]]] = {grid_mode: [] for grid_mode in grid_modes}
    for grid_mode in grid_modes:
        peaks[grid_mode] = _peak(pipeline, size, grid_mode, new_tokens, device=device, threads=threads)
        on_step()
    for _ in range(repeats):
        for grid_mode, sequence in sequences.items():
            runs[grid_mode].append(_run_once(pipeline, sequence, new_tokens))
            on_step()
    modes = []
    for grid_mode, sequence in sequences.items():
        shares = _vision_shares(pipeline, sequence, device=device, threads=threads)
        modes.append(_summarise(pipeline, sequence, runs[grid_mode], shares, peaks[grid_mode]))
        on_step()
    manifest, cache = pipeline.manifest, pipeline.generator.decoder
    planned = _planned_image(sequence)
    return Profile(
        bundle=str(pipeline.folder),
        machine=machine(device, threads),
        backend=manifest.backend,
        precision={"vision": manifest.precision.vision, "language": manifest.precision.language},
        size=size,
        crops=len(planned.plan.crop_sizes),
        visual_tokens=len(planned),
        positions=len(sequence),
        repeats=repeats,
        new_tokens=new_tokens,
        weight_bytes=sum(r.bytes for name, r in manifest.files.items() if name.split(".")[-1] in _WEIGHTS),
        kv_bytes=round(cache.kv_bytes * len(sequence) / cache.context),
        kv_bytes_allocated=cache.kv_bytes,
        vision_split=all(VISION_STAGES[0] in mode.stages for mode in modes),
        engines=_engines(pipeline),
        modes=tuple(modes),
    )


_WEIGHTS = ("onnx", "data", "engine", "npy")


def steps(grid_modes: Sequence[str], repeats: int) -> int:
    """How often `profile_pipeline` calls `on_step`."""
    return len(grid_modes) * (repeats + 3)


def answer_once(
    bundle: str, size: Size, new_tokens: int, *, device: str, threads: int | None, **settings: Any
) -> None:
    """Open `bundle` with `settings` (see `Pipeline.open`) and answer as one run of the profile does."""
    with Pipeline.open(bundle, device=device, threads=threads, **settings) as pipeline:
        (sequence,) = _sequences(pipeline, size, [settings["grid_mode"]], new_tokens).values()
        _run_once(pipeline, sequence, new_tokens)


def _peak(
    pipeline: Pipeline, size: Size, grid_mode: str, new_tokens: int, *, device: str, threads: int | None
) -> int | None:
    """The most resident memory of `answer_once` in mode `grid_mode`; None where it was not measured.

    In a process of its own, because engines keep what other modes needed. It loads the bundle again: not
    onto a GPU, and not where this process's peak says that there is no room for another.
    """
    room, needed = available_memory(), peak_memory()
    if device != "cpu" or (room is not None and needed is not None and room < needed):
        return None
    return peak_apart(
        answer_once,
        bundle=str(pipeline.folder),
        size=size,
        new_tokens=new_tokens,
        device=device,
        threads=threads,
        context=pipeline.generator.decoder.context,
        grid_mode=grid_mode,
        max_slices=pipeline.settings.max_slices,
        resize=pipeline.settings.resize,
    )


def _sequences(
    pipeline: Pipeline, size: Size, grid_modes: Sequence[str], new_tokens: int
) -> dict[str, PromptSequence]:
    """The same question in each grid mode; the pipeline's own mode stays as it was."""
    image, before = pattern(*size), pipeline.settings
    prompt = prompts.render(QUESTION, before.template)
    sequences = {}
    try:
        for grid_mode in grid_modes:
            pipeline.configure(grid_mode=grid_mode)
            sequences[grid_mode] = pipeline.sequence(image, prompt)
    finally:
        pipeline.settings = before
    positions, context = max(map(len, sequences.values())), pipeline.generator.decoder.context
    if positions + new_tokens > context:
        raise UhdError(
            f"profile: {positions} positions and {new_tokens} tokens do not fit the context of {context}; "
            "use a smaller --size or fewer --tokens"
        )
    return sequences


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
    planned = _planned_image(sequence)
    batches = pipeline.encoder.batches(cut(planned.image, planned.plan), planned.grid_mode)
    feeds = [feeds for _, feeds in batches]
    path = pipeline.folder / part_files(backend)[0]
    return vision_shares(path, feeds, backend=backend, device=device, threads=threads)


def _summarise(
    pipeline: Pipeline,
    sequence: PromptSequence,
    runs: Sequence[dict[str, Any]],
    shares: Mapping[str, float],
    peak: int | None,
) -> ModeProfile:
    """The figures of one mode from what `_run_once` returned each time."""
    planned = _planned_image(sequence)
    seconds = {name: Spread.of([run[name] for run in runs]) for name in ("pixels", "vision", "prefill")}
    decode = Spread.of([step for run in runs for step in run["decode"]])
    costs = _flops(planned.plan.patch_grids, pipeline.manifest, len(sequence), planned.grid_mode)
    stages = {"pixels": StageProfile(seconds["pixels"], None)}
    vision = sum(costs[stage] for stage in VISION_STAGES)
    stages["vision"] = StageProfile(seconds["vision"], vision)
    for stage, share in shares.items():
        if share > 0:
            # One figure without a spread: that of the whole says nothing of the shares.
            part = Spread.of([seconds["vision"].median * share])
            stages[stage] = StageProfile(part, costs[stage])
    stages["prefill"] = StageProfile(seconds["prefill"], costs["prefill"])
    stages["decode"] = StageProfile(decode, costs["decode"])
    first = Spread.of([run["pixels"] + run["vision"] + run["prefill"] for run in runs])
    return ModeProfile(planned.grid_mode, stages, first, 1 / decode.median, peak)


def _run_once(pipeline: Pipeline, sequence: PromptSequence, new_tokens: int) -> dict[str, Any]:
    """Seconds of each stage of one answer with nothing cached but geometry; `decode` is a list."""
    pipeline.forget()
    planned = _planned_image(sequence)
    clock = time.perf_counter
    start = clock()
    batches = list(pipeline.encoder.batches(cut(planned.image, planned.plan), planned.grid_mode))
    pixels = clock()
    tokens: list[NDArray[Any]] = [np.empty(0)] * len(planned.plan.crop_sizes)
    for members, feeds in batches:
        for index, result in zip(members, pipeline.vision.infer(feeds)[TOKENS], strict=True):
            tokens[index] = result
    vision = clock()
    pipeline.images.add(planned, tokens)
    token = greedy(pipeline.generator.prefill(sequence))
    prefill = clock()
    decode = []
    for _ in range(new_tokens):
        begun = clock()
        token = greedy(pipeline.generator.step(token))
        decode.append(clock() - begun)
    return {
        "pixels": pixels - start,
        "vision": vision - pixels,
        "prefill": prefill - vision,
        "decode": decode,
    }


def _planned_image(sequence: PromptSequence) -> PlannedImage:
    return next(s.content for s in sequence.segments if isinstance(s.content, PlannedImage))


def _flops(grids: Sequence[Grid], manifest: Manifest, positions: int, grid_mode: str) -> dict[str, int]:
    """FLOPs by stage of the graphs in the bundle.

    Without folding, the projector and the JBU's last fix-up are the released computation, but crops
    are not padded, the last ViT layer is gone and logits are for the last position only.
    """
    model, folded = manifest.model, manifest.fold
    parts: dict[str, flops.Parts] = {
        "vit": flops.vit(grids, model.vision, folded=True),
        "jbu": flops.jbu(grids, model.projector, folded=folded),
        "prefill": flops.prefill(model.language, positions, folded=True),
        "decode": flops.decode(model.language, positions),
    }
    counts = {stage: flops.total(work).flops for stage, work in parts.items()}
    # Crops of one shape are a batch of their own: none is padded to another's windows.
    counts["hiwin"] = sum(
        flops.total(
            flops.projector(
                [g for g in grids if g == shape], model.projector, folded=folded, grid_mode=grid_mode
            )
        ).flops
        for shape in dict.fromkeys(grids)
    )
    return counts
