"""Parity: how far a bundle's parts are from the PyTorch model, on inputs with a name."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from uhd_export.bundle.loss import (
    GreedyRun,
    answer_entries,
    is_lossy,
    is_rounded,
    loss_entries,
    relative_error,
)
from uhd_export.bundle.peer import peer_entries
from uhd_export.bundle.stages import PARITY
from uhd_export.checkpoint.config import CheckpointConfig
from uhd_export.checkpoint.reader import Checkpoint
from uhd_export.model.reference import (
    VisionReference,
    embedding_rows,
    head_logits,
    reference_embeds,
    streamed_states,
)
from uhd_export.runtime.bundle.manifest import LANGUAGE, VISION, Manifest, Parity, read_manifest
from uhd_export.runtime.bundle.probe import record_probe
from uhd_export.runtime.choices import GRID_MODES
from uhd_export.runtime.image.pattern import pattern
from uhd_export.runtime.image.pixels import cut
from uhd_export.runtime.language import prompt as prompts
from uhd_export.runtime.language.sampling import greedy
from uhd_export.runtime.language.sequence import PromptSequence
from uhd_export.runtime.memory import available_memory
from uhd_export.runtime.pipeline import Pipeline
from uhd_export.runtime.progress import Bar, progress_bar
from uhd_export.runtime.units import format_bytes

# A 500x336 image makes two 280x378 slices and a 406x266 overview: no crop is square.
SIZE = (500, 336)
NAME = f"pattern {SIZE[0]}x{SIZE[1]}"
QUESTION = "What is shown in this image?"
NEW_TOKENS = 16
# Largest relative errors by the type of the weights; other types are for information. Greedy tokens may
# tip either way in float16.
LIMITS = {"float32": 1e-3, "float16": 5e-2}
# Where activations are rounded to int8 before each product.
INT8_LIMIT = 1e-1
_CONTEXT = 1024
_CONTEXT_TO_ASK = 2048


def measure_parity(
    bundle: Path,
    checkpoint: Checkpoint,
    config: CheckpointConfig,
    *,
    original: Checkpoint | None = None,
    questions: int = 0,
    device: str | None = None,
    record: bool = False,
    progress: bool = False,
) -> list[Parity]:
    """Compare the bundle in folder `bundle` with `checkpoint`, as it is stored, in float32 PyTorch.

    Vision: tokens of a slice in the bundle's grid mode and of the overview in every mode. Language: the
    whole model's logits after a prompt with an image, and 16 greedy tokens; where anything is rounded, what
    each step of that cost against the `original` checkpoint, and how many of `questions` to the embedded
    model are answered wrongly; and the independent check of `peer`. Where the memory at hand is too small,
    the entries say so instead of a figure. `device` is where the bundle runs (default: as its backend does).
    With `record`, logits for `check_device` are left in the folder.
    """
    manifest = read_manifest(bundle)
    shortage = _memory_shortage(bundle, manifest)
    if shortage is not None:
        return [
            Parity(part, NAME, metric, None, limit, shortage)
            for part, metric, limit in (
                ("vision", "relative error", _vision_limit(manifest)),
                ("logits", "relative error", _language_limit(manifest)),
                ("tokens", "differing", _token_limit(manifest)),
            )
        ]
    context = min(manifest.settings.context, _CONTEXT_TO_ASK if questions else _CONTEXT)
    with (
        progress_bar(PARITY, len(GRID_MODES) + 4, show=progress) as bar,
        Pipeline.open(bundle, device=device, context=context, resize=None) as pipeline,
    ):
        reference = VisionReference(checkpoint, config, roi_rounding=manifest.settings.roi_rounding)
        bar.advance()
        results = list(_vision(pipeline, reference, bar))
        results += _language(pipeline, checkpoint, config, reference, original)
        if questions and original is not None and is_rounded(manifest):
            results += answer_entries(pipeline, original, config, questions)
        if record:
            record_probe(bundle, manifest, pipeline.generator)
        bar.advance(2)
    return results


def _vision(pipeline: Pipeline, reference: VisionReference, bar: Bar) -> Iterator[Parity]:
    manifest = pipeline.manifest
    limit = _vision_limit(manifest)
    image = pattern(*SIZE)
    crops = cut(image, pipeline.plan(image))
    cases = [("slice", crops[0], manifest.settings.grid_mode)] if len(crops) > 1 else []
    cases += [("overview", crops[-1], grid_mode) for grid_mode in GRID_MODES]
    for name, crop, grid_mode in cases:
        height, width = crop.shape[:2]
        error = relative_error(
            pipeline.encoder.encode([crop], grid_mode)[0], reference.encode(crop, grid_mode)
        )
        yield Parity(
            "vision", f"{NAME}, {name} {width}x{height}, {grid_mode}", "relative error", error, limit, None
        )
        bar.advance()


def _language(
    pipeline: Pipeline,
    checkpoint: Checkpoint,
    config: CheckpointConfig,
    reference: VisionReference,
    original: Checkpoint | None,
) -> list[Parity]:
    """One pass of the reference over the prompt and the bundle's own tokens judges both entries.

    A token counts as different where the reference prefers another one by more than rounding: if none
    does, the reference's greedy tokens are the same.
    """
    manifest = pipeline.manifest
    limit, token_limit = _language_limit(manifest), _token_limit(manifest)
    image = pattern(*SIZE)
    prompt = prompts.render(QUESTION, manifest.settings.template)
    sequence = PromptSequence(pipeline.input_ids(prompt), [pipeline.plan_image(image)])
    room = pipeline.generator.decoder.context - len(sequence)
    count = max(min(NEW_TOKENS, room), 0)
    metric = f"differing of {count} greedy tokens"
    if count == 0:
        reason = f"{len(sequence)} positions fill the context of {pipeline.generator.decoder.context}"
        return [
            Parity("logits", NAME, "relative error", None, limit, reason),
            Parity("tokens", NAME, metric, None, token_limit, reason),
        ]
    logits = [pipeline.generator.prefill(sequence)]
    tokens = [greedy(logits[0])]
    while len(tokens) < count:  # past an end of text too: it is arithmetic that is compared
        logits.append(pipeline.generator.step(tokens[-1]))
        tokens.append(greedy(logits[-1]))
    embeds = reference_embeds(checkpoint, reference, sequence)
    embeds = np.concatenate([embeds, embedding_rows(checkpoint, tokens[:-1])])
    states = streamed_states(checkpoint, config, embeds, len(tokens))
    expected = head_logits(checkpoint, config, states)
    preference = expected.max(1) - expected[np.arange(len(tokens)), tokens]
    different = float((preference > LIMITS["float32"] * np.abs(expected).max()).sum())
    results = [
        Parity("logits", NAME, "relative error", relative_error(logits[0], expected[0]), limit, None),
        Parity("tokens", NAME, metric, different, token_limit, None),
    ]
    if is_rounded(manifest):
        greedy_run = GreedyRun(NAME, sequence, tokens, np.stack(logits), embeds, states, expected)
        results += loss_entries(pipeline, original, config, greedy_run)
    prompt_embeds = embeds[: len(sequence)]
    return results + peer_entries(
        pipeline, checkpoint.folder, prompt_embeds, logits[0], None if is_lossy(manifest) else limit
    )


def _vision_limit(manifest: Manifest) -> float | None:
    return LIMITS.get(manifest.precision.vision) if manifest.vision_quantization is None else INT8_LIMIT


def _language_limit(manifest: Manifest) -> float | None:
    precision = manifest.precision
    if _int8(manifest):
        return INT8_LIMIT
    return LIMITS["float32" if precision.language == precision.cache == "float32" else "float16"]


def _token_limit(manifest: Manifest) -> float | None:
    precision = manifest.precision
    exact = precision.language == precision.vision == precision.cache == "float32"
    return 0.0 if exact and not _int8(manifest) else None


def _int8(manifest: Manifest) -> bool:
    """Where the language model's activations, its inputs, or its keys and values are rounded."""
    rounded = manifest.quantization is not None and manifest.quantization.activations == "int8"
    return rounded or manifest.precision.cache == "int8" or manifest.vision_quantization is not None


def _memory_shortage(bundle: Path, manifest: Manifest) -> str | None:
    """Why parity cannot be measured here, or None. The estimate counts what is resident at once.

    ONNX Runtime's CPU kernels repack matrices, and convert float16 weights to float32: opening a bundle of
    1.6 GB of float16 weights took 3.9 GB, one of 3.2 GB in float32 took 3.5 GB.
    """
    available = available_memory()

    def opened(part: str, dtype: str, rounded: bool) -> float:
        size = sum(path.stat().st_size for path in bundle.glob(f"{part}.data"))
        # Integers are repacked as they are.
        return size * (2.6 if dtype == "float16" and not rounded else 1.2)

    precision = manifest.precision
    weights = opened(VISION, precision.vision, manifest.vision_quantization is not None)
    twice = precision.cache != precision.language  # then the language part is opened again
    weights += (1 + twice) * opened(LANGUAGE, precision.language, manifest.quantization is not None)
    vision, projector, language = manifest.model.vision, manifest.model.projector, manifest.model.language
    # Reference weights in float32: the vision part, then the largest of a layer and the head.
    reference = 4 * (
        vision.layers * (4 * vision.hidden**2 + 2 * vision.hidden * vision.intermediate)
        + 12 * projector.hidden**2
        + max(
            4 * language.hidden**2 + 3 * language.hidden * language.intermediate,
            language.hidden * language.vocab,
        )
    )
    # Its widest activations: keys and values of the pyramid mode, and a 4x map in D channels.
    activations = 4 * projector.hidden * (6 * 144 * 126 + 8 * 16 * 540)
    cache = 8 * language.layers * language.kv_heads * language.head_size * _CONTEXT
    needed = int(weights + reference + activations + cache)
    if available is None or needed <= available:
        return None
    return f"needs about {format_bytes(needed)} of memory, {format_bytes(available)} are available"
