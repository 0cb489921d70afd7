"""What an answer takes of a model that is named, read from a config, or built already."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from uhd_export.bundle.options import BuildOptions
from uhd_export.bundle.presets import PRESETS, adapted
from uhd_export.bundle.size import BundleSize, bundle_size
from uhd_export.bundle.subject import Subject
from uhd_export.checkpoint.options import ImageOptions
from uhd_export.graph.int4.options import WeightOptions
from uhd_export.runtime.bundle.manifest import Manifest
from uhd_export.runtime.config import ModelConfig
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.slicing import SlicePlan
from uhd_export.runtime.planning.bundle import bundle_layout, bundle_weights, is_smallest
from uhd_export.runtime.planning.memory import MemoryPlan, Workload, visual_positions
from uhd_export.runtime.profiling.devices import Device
from uhd_export.runtime.profiling.predict import Speed, predict_seconds
from uhd_export.runtime.profiling.rates import Rates

FIRST_PRESET = "exact"
THIS_MACHINE = "this machine"


@dataclass(frozen=True)
class AnswerPlan:
    """An answer's memory and time, and what it is about; `remedies` are empty where it fits.

    `build` are the options of `build` that it stands for.
    """

    name: str
    model: ModelConfig
    preset: str | None
    build: str | None
    device: str
    memory: MemoryPlan
    disk: int
    available: int | None
    remedies: tuple[str, ...]
    seconds: dict[str, float]
    how: str

    def facts(self) -> dict[str, Any]:
        """Ready for JSON; sizes in bytes."""
        plan = self.memory
        weights = plan.weights
        return {
            "model": self.name,
            "preset": self.preset,
            "build": self.build,
            "device": self.device,
            "positions": plan.positions,
            "context": plan.capacity,
            "bytes": {
                "language weights": weights.language,
                "head": weights.head,
                "embeddings on disk": weights.embeddings,
                "vision weights": weights.vision,
                "cache used": plan.cache,
                "cache reserved": plan.reserved,
                "vision activations": plan.vision,
                "prefill activations": plan.prefill,
                "programs": plan.base,
            },
            "prefill_chunk": plan.bounds.chunk,
            "stages": plan.stages,
            "peak": plan.peak,
            "peak_stage": plan.peak_stage,
            "disk": self.disk,
            "available": self.available,
            "fits": plan.fits(self.available),
            "remedies": list(self.remedies),
            "seconds": self.seconds,
            "seconds_are": f"predicted, not measured: {self.how}",
        }


@dataclass(frozen=True)
class Question:
    """What is asked about: an image cut as `slices`, a cache of `context` and runs of `chunk` positions.

    None is the model's context, and the whole prompt. `source` says how fast the machine is and whether it
    is a GPU; `memory` is what it has.
    """

    slices: SlicePlan
    images: ImageOptions
    source: Device | Rates | None
    memory: int | None
    context: int | None = None
    chunk: int | None = None

    @property
    def device(self) -> str:
        """The kind of device."""
        return "cuda" if isinstance(self.source, Device) else "cpu"


def plan_model(subject: Subject, question: Question, preset: str | None) -> AnswerPlan:
    """Of `subject`, built with `preset` where it is not yet. Raises UhdError."""
    device = question.source.name if isinstance(question.source, Device) else None
    subject.check(device, question.context)
    if subject.manifest is not None:
        if preset is not None:
            raise UhdError(
                f"--preset {preset}: {subject.name} is a bundle, which is built already; leave it out"
            )
        return _of_bundle(subject, subject.manifest, question)
    model = subject.model
    if preset is None and not subject.quantized:
        preset = FIRST_PRESET
    size = bundle_size(model, _options(preset, question), question.device)
    work = _workload(model, size, subject.layout, question)
    plan, fits = _plan(work, question)
    remedies = [] if fits else [*_remedies(work, question), *_presets(subject, preset, question)]
    seconds, how = _seconds(work, question, size.integer_vision, size.integer_language)
    return AnswerPlan(
        subject.name,
        model,
        preset,
        _flags(preset, question.device),
        device or THIS_MACHINE,
        plan,
        size.disk,
        question.memory,
        tuple(remedies),
        seconds,
        how,
    )


def _of_bundle(subject: Subject, manifest: Manifest, question: Question) -> AnswerPlan:
    device, settings = question.device, manifest.settings
    layout = replace(bundle_layout(manifest, device), grid_mode=question.images.grid_mode)
    capacity = question.context or settings.context
    positions = visual_positions(question.slices, settings.layout, manifest.model.projector.side)
    _check(positions, capacity)
    work = Workload(
        manifest.model, bundle_weights(manifest, device), layout, question.slices, positions, capacity
    )
    plan, fits = _plan(work, question)
    label = question.source.name if isinstance(question.source, Device) else THIS_MACHINE
    packed = manifest.quantization is not None and manifest.quantization.method is not None
    seconds, how = _seconds(work, question, manifest.vision_quantization is not None, packed)
    disk = sum(record.bytes for record in manifest.files.values())
    remedies = () if fits else tuple(_remedies(work, question))
    if not fits and not remedies and question.memory is not None:
        smaller = () if is_smallest(manifest) else ("a bundle of a smaller --preset",)
        over = work.fitted(question.memory).peak - question.memory
        remedies = (f"{over / 1e9:.1f} GB more", *smaller)
    return AnswerPlan(
        subject.name,
        manifest.model,
        None,
        None,
        label,
        plan,
        disk,
        question.memory,
        remedies,
        seconds,
        how,
    )


def _options(preset: str | None, question: Question) -> BuildOptions:
    """A build for ONNX Runtime, in float16 on a GPU, where a float32 cache has no kernel.

    Without `preset`, as `build` writes weights that are in 4 bits already.
    """
    dtype = None if question.device == "cpu" else "float16"
    if preset is None:
        return BuildOptions(weights=WeightOptions(weights="int4"), images=question.images, dtype=dtype)
    if dtype is None:
        return replace(adapted(preset, "onnxruntime")[0].options(), images=question.images)
    chosen = adapted(preset, "onnxruntime", dtype)[0]
    return replace(replace(chosen, dtype=dtype, cache=None).options(), images=question.images)


def _flags(preset: str | None, device: str) -> str | None:
    """The options of `build` that `_options` stand for; None is none."""
    flags = [] if preset is None else [f"--preset {preset}"]
    if device != "cpu":
        flags.append("--dtype float16")
        if preset is not None and PRESETS[preset].cache is not None:
            flags.append("--cache float16")
    return " ".join(flags) or None


def _workload(model: ModelConfig, size: BundleSize, layout: str, question: Question) -> Workload:
    capacity = question.context or model.language.context
    positions = visual_positions(question.slices, layout, model.projector.side)
    _check(positions, capacity)
    return Workload(model, size.resident, size.layout, question.slices, positions, capacity)


def _check(positions: int, capacity: int) -> None:
    if positions > capacity:
        raise UhdError(f"--context {capacity}: the prompt takes {positions} positions; use more")


def _plan(work: Workload, question: Question) -> tuple[MemoryPlan, bool]:
    bounds = work.layout.bounds
    plan = work.plan(replace(bounds, chunk=question.chunk or bounds.chunk))
    return plan, plan.fits(question.memory)


def _remedies(work: Workload, question: Question) -> Iterator[str]:
    """Without another bundle."""
    if question.memory is None:
        return
    fitted = work.fitted(question.memory)
    if fitted.fits(question.memory):
        changes, own = [], question.chunk is None
        if fitted.bounds.chunk != work.layout.bounds.chunk:
            changes.append(f"--prefill-chunk {fitted.bounds.chunk}")
        elif not own:
            changes.append("no --prefill-chunk")
        if fitted.bounds.rows != work.layout.bounds.rows:
            changes.append("one crop at a time")
        if changes:
            yield " and ".join(changes) + (", which run and serve do by themselves" if own else "")
    capacity = work.fitting_capacity(question.memory)
    if capacity is not None:
        yield f"--context {capacity}"


def _presets(subject: Subject, preset: str | None, question: Question) -> Iterator[str]:
    """The first smaller preset that fits; where none does, how much the smallest is over."""
    model, names = subject.model, list(PRESETS)
    smaller = names[names.index(preset or FIRST_PRESET) + 1 :] or names[-1:]
    for name in smaller:
        size = bundle_size(model, _options(name, question), question.device)
        work = _workload(model, size, subject.layout, question)
        least = work.fitted(question.memory)
        if least.fits(question.memory):
            chunk = least.bounds.chunk
            shorter = "" if chunk == work.layout.bounds.chunk else f" with --prefill-chunk {chunk}"
            if name != preset:
                yield f"{_flags(name, question.device)}{shorter}"
            return
    if question.memory is not None:
        over = least.peak - question.memory
        yield f"{over / 1e9:.1f} GB more, even for --preset {smaller[-1]}"


def _seconds(
    work: Workload, question: Question, vision: bool, language: bool
) -> tuple[dict[str, float], str]:
    if question.source is None:
        return {}, "this machine could not be measured: ONNX Runtime is not installed"
    speed = Speed.of(question.source)
    return predict_seconds(work, speed, integer_vision=vision, integer_language=language), speed.how
