"""What a bundle's answers take: its parts' bytes from the manifest."""

import math
from dataclasses import replace

import numpy as np

from uhd_export.runtime.bundle.manifest import EMBEDDINGS, Manifest, part_files
from uhd_export.runtime.choices import ENGINE_BACKENDS
from uhd_export.runtime.engines.device import parse_device
from uhd_export.runtime.image.slicing import SCALE_RESOLUTION, Size, plan_slices
from uhd_export.runtime.memory import available_memory, free_device_memory
from uhd_export.runtime.planning.memory import (
    PACKED_INT4,
    Bounds,
    Layout,
    Weights,
    Workload,
    visual_positions,
)
from uhd_export.runtime.settings import Settings


def bundle_layout(manifest: Manifest, device: str) -> Layout:
    """How the bundle runs on `device`, "cpu" or "cuda"."""
    precision = manifest.precision
    # A processor multiplies in float32, whatever dense weights are stored in.
    item = 4 if device == "cpu" else np.dtype(precision.language).itemsize
    return Layout(
        item, np.dtype(precision.cache).itemsize, device, manifest.fold, manifest.settings.grid_mode
    )


def bundle_weights(manifest: Manifest, device: str) -> Weights:
    """Bytes of its weights in memory on `device`."""

    def size(name: str) -> int:
        return sum(r.bytes for file, r in manifest.files.items() if file in (name, f"{name}.data"))

    vision, language = (size(name) for name in part_files(manifest.backend))
    config, quantization = manifest.model.language, manifest.quantization
    item = np.dtype(manifest.precision.language).itemsize
    bits = None if quantization is None else quantization.head_bits
    head = config.vocab * config.hidden * item if bits is None else 0
    if bits is not None:
        head = config.vocab * config.hidden * bits // 8 + config.vocab * config.hidden // 128 * item
    language = max(language - head, 0)
    if device == "cpu" and manifest.backend not in ENGINE_BACKENDS:  # float16 becomes float32 when loaded
        vision *= 4 // np.dtype(manifest.precision.vision).itemsize
        head *= 4 // item if bits is None else 1
        packed = quantization is not None and quantization.method is not None
        language = round(language * PACKED_INT4) if packed else language * (4 // item)
    return Weights(vision, language, head, size(EMBEDDINGS))


def bundle_workload(
    manifest: Manifest,
    size: Size,
    device: str,
    *,
    settings: Settings | None = None,
    context: int | None = None,
) -> Workload:
    """An answer about an image of `size`. Raises UhdError where it cannot be cut."""
    settings = settings or manifest.settings
    slices = plan_slices(
        size,
        max_slices=settings.max_slices,
        resize=settings.resize,
        upscale_only=settings.upscale_only,
        patch=manifest.model.vision.patch,
    )
    capacity = context or settings.context
    positions = visual_positions(slices, settings.layout, manifest.model.projector.side)
    return Workload(
        manifest.model,
        bundle_weights(manifest, device),
        bundle_layout(manifest, device),
        slices,
        min(positions, capacity),
        capacity,
    )


def largest(settings: Settings) -> Size:
    """A square image that takes as many slices as `settings` allow, of the size that slices have at most."""
    side = SCALE_RESOLUTION * math.ceil(math.sqrt(settings.max_slices))
    return side, side


def fitting_bounds(
    manifest: Manifest, device: str, settings: Settings, context: int | None, available: int | None = None
) -> Bounds:
    """With which the largest image's answer fits into `available` bytes (default: what `device` has)."""
    if manifest.backend in ENGINE_BACKENDS:  # engines reserved their activations when they were built
        return Bounds()
    work = bundle_workload(manifest, largest(settings), device, settings=settings, context=context)
    return work.fitted(room(device) if available is None else available).bounds


def is_smallest(manifest: Manifest) -> bool:
    """Whether all is stored in as few bits as its backend has, so that no preset makes it smaller."""
    language = manifest.quantization
    if language is None or language.method is None:
        return False
    # Engines have no 8-bit head; ONNX Runtime has 8-bit vision beside float32 activations alone.
    whole = manifest.backend not in ENGINE_BACKENDS and manifest.precision.vision == "float32"
    return language.lm_head == "int4" and (manifest.vision_quantization is not None or not whole)


def room(device: str) -> int | None:
    """Bytes that an answer may take on `device`, such as "cpu" or "cuda:1"; None where that is not known."""
    kind, number = parse_device(device)
    return available_memory() if kind == "cpu" else free_device_memory(number)


def shortage(
    manifest: Manifest,
    device: str,
    *,
    settings: Settings | None = None,
    context: int | None = None,
    beside: int = 0,
    available: int | None = None,
    slicing: bool = True,
) -> str | None:
    """One line where an answer about a large image will not fit, with the remedy; else None.

    `beside` are bytes that are reserved as well, such as those of other answers at a time;
    `slicing` says whether the user may choose --max-slices.
    """
    available = room(device) if available is None else available
    settings = settings or manifest.settings
    work = bundle_workload(manifest, largest(settings), device, settings=settings, context=context)
    plan = work.fitted(available)
    if available is None or plan.peak + beside <= available:
        return None
    capacity = work.fitting_capacity(available - beside)
    remedies = [f"use --context {capacity}"] if capacity is not None else []
    if capacity is None:
        over = (plan.peak + beside - available) / 1e9
        smaller = "" if is_smallest(manifest) else " or a bundle of a smaller --preset"
        remedies = [f"use {over:.1f} GB more{smaller}"]
    if slicing and settings.max_slices > 1:
        one = replace(settings, max_slices=1)
        alone = bundle_workload(manifest, largest(one), device, settings=one, context=context)
        if alone.fitted(available).peak + beside <= available:
            remedies.append("--max-slices 1")
    return (
        f"memory: an answer about a large image takes {(plan.peak + beside) / 1e9:.1f} GB at its peak "
        f"({plan.peak_stage}), {available / 1e9:.1f} GB are available; {', or '.join(remedies)}"
    )
