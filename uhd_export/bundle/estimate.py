"""What an answer takes of a model that is named, read from a config, or built already."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from uhd_export.bundle.options import BuildOptions
from uhd_export.bundle.presets import PRESETS, adapted
from uhd_export.bundle.size import BundleSize, bundle_size
from uhd_export.checkpoint.config import parse_config, read_config
from uhd_export.checkpoint.fields import read_json
from uhd_export.checkpoint.options import ImageOptions
from uhd_export.checkpoint.source import EMBEDDED, NANO, locate
from uhd_export.checkpoint.vision_tower import recorded_tower
from uhd_export.runtime.bundle.manifest import MANIFEST, Manifest, read_manifest
from uhd_export.runtime.config import OFFICIAL, ModelConfig, official
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.slicing import SlicePlan
from uhd_export.runtime.planning.bundle import bundle_layout, bundle_weights
from uhd_export.runtime.planning.memory import MemoryPlan, Workload, visual_positions
from uhd_export.runtime.profiling.devices import Device
from uhd_export.runtime.profiling.predict import Speed, predict_seconds
from uhd_export.runtime.profiling.rates import Rates

FIRST_PRESET = "exact"


@dataclass(frozen=True)
class AnswerPlan:
    """An answer's memory and time, and what it is about; `remedies` are empty where it fits."""

    name: str
    model: ModelConfig
    preset: str | None
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


def plan_model(name: str, question: Question, preset: str | None) -> AnswerPlan:
    """Of the model called `name`: an official one's, a config's, or a bundle. Raises UhdError."""
    if (Path(name) / MANIFEST).is_file():
        if preset is not None:
            raise UhdError(f"--preset {preset}: {name} is a bundle, which is built already; leave it out")
        return _of_bundle(name, read_manifest(name), question)
    model, layout = _sizes(name)
    preset = preset or FIRST_PRESET
    size = bundle_size(model, _options(preset, question), question.device)
    work = _workload(model, size, layout, question)
    plan, fits = _plan(work, question)
    remedies = [] if fits else [*_remedies(work, question), *_presets(model, layout, preset, question)]
    label = question.source.name if isinstance(question.source, Device) else "this machine"
    seconds, how = _seconds(work, question, size.integer_vision, size.integer_language)
    return AnswerPlan(
        name, model, preset, label, plan, size.disk, question.memory, tuple(remedies), seconds, how
    )


def _of_bundle(name: str, manifest: Manifest, question: Question) -> AnswerPlan:
    device, settings = question.device, manifest.settings
    layout = replace(bundle_layout(manifest, device), grid_mode=question.images.grid_mode)
    capacity = question.context or settings.context
    positions = visual_positions(question.slices, settings.layout, manifest.model.projector.side)
    _check(positions, capacity)
    work = Workload(
        manifest.model, bundle_weights(manifest, device), layout, question.slices, positions, capacity
    )
    plan, fits = _plan(work, question)
    label = question.source.name if isinstance(question.source, Device) else "this machine"
    packed = manifest.quantization is not None and manifest.quantization.method is not None
    seconds, how = _seconds(work, question, manifest.vision_quantization is not None, packed)
    disk = sum(record.bytes for record in manifest.files.values())
    remedies = () if fits else tuple(_remedies(work, question)) or ("a bundle of --preset small",)
    return AnswerPlan(name, manifest.model, None, label, plan, disk, question.memory, remedies, seconds, how)


def _sizes(name: str) -> tuple[ModelConfig, str]:
    """The sizes of a model, and the layout of its tokens."""
    known = {official_name.lower(): official_name for official_name in OFFICIAL}
    if name.lower() in known:
        return official(known[name.lower()]), "flat"
    path = Path(name)
    if path.is_file():
        raw = read_json(path)
        config = parse_config(raw, recorded_tower(path.parent, raw))
    elif path.exists() or "/" in name or name == NANO:
        # Sizes are in its files of JSON: a checkpoint on the hub is not downloaded for them.
        config = read_config(EMBEDDED if name == NANO else locate(name, weights=False))
    else:
        raise UhdError(f"--model {name!r}: give {', '.join(known)}, a config.json or its folder, or a bundle")
    return config.model, config.layout


def _options(preset: str, question: Question) -> BuildOptions:
    """A build for ONNX Runtime, in float16 on a GPU, where a float32 cache has no kernel."""
    if question.device == "cpu":
        return replace(adapted(preset, "onnxruntime")[0].options(), images=question.images)
    chosen = adapted(preset, "onnxruntime", "float16")[0]
    options = replace(chosen, dtype="float16").options()
    return replace(options, images=question.images, cache=None)


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
        changes = []
        if fitted.bounds.chunk != work.layout.bounds.chunk:
            changes.append(f"--prefill-chunk {fitted.bounds.chunk}")
        if fitted.bounds.rows != work.layout.bounds.rows:
            changes.append("one crop at a time")
        yield " and ".join(changes) + ", which run and serve do by themselves"
    capacity = work.fitting_capacity(question.memory)
    if capacity is not None:
        yield f"--context {capacity}"


def _presets(model: ModelConfig, layout: str, preset: str, question: Question) -> Iterator[str]:
    """The first smaller preset that fits; where none does, how much the smallest is over."""
    names = list(PRESETS)
    smaller = names[names.index(preset) + 1 :] or [preset]
    for name in smaller:
        size = bundle_size(model, _options(name, question), question.device)
        work = _workload(model, size, layout, question)
        least = work.fitted(question.memory)
        if least.fits(question.memory):
            chunk = least.bounds.chunk
            shorter = "" if chunk == work.layout.bounds.chunk else f" with --prefill-chunk {chunk}"
            if name != preset:
                yield f"--preset {name}{shorter}"
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
