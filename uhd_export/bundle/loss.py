"""What each step from the original checkpoint to what a bundle runs costs, switched on one after another."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from uhd_export.checkpoint.config import CheckpointConfig
from uhd_export.checkpoint.options import ImageOptions
from uhd_export.checkpoint.reader import Checkpoint
from uhd_export.graph.float_cache import float_cache_engine
from uhd_export.model.reference import embedding_rows, head_logits, streamed_states
from uhd_export.model.uhd import UhdModel
from uhd_export.nano.evaluate import evaluate
from uhd_export.nano.reference import LONGEST_ANSWER, model_answer
from uhd_export.runtime.bundle.manifest import LANGUAGE, Manifest, Parity
from uhd_export.runtime.engines.onnxruntime import OrtEngine
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.language.decoder import Decoder
from uhd_export.runtime.language.sequence import PlannedImage, PromptSequence
from uhd_export.runtime.pipeline import Pipeline

ORIGINAL = "the original checkpoint, in PyTorch"
ERROR, DIVERGENCE = "relative error of logits", "KL divergence in nats"


@dataclass(frozen=True)
class GreedyRun:
    """A prompt named `inputs` and the bundle's greedy `tokens` after it, T of them.

    `logits` (T, vocab) are the bundle's. In PyTorch, of the weights as the bundle stores them: `embeds`
    (S + T - 1, D) with the unrounded vision part, `states` (T, D) before the head, `stored` (T, vocab) after.
    """

    inputs: str
    sequence: PromptSequence
    tokens: list[int]
    logits: np.ndarray
    embeds: np.ndarray
    states: np.ndarray
    stored: np.ndarray


def is_lossy(manifest: Manifest) -> bool:
    """Whether the bundle rounds what the checkpoint stores, or what is multiplied with it."""
    rounded = manifest.quantization is not None or manifest.vision_quantization is not None
    return rounded or manifest.precision.cache != manifest.precision.language


def is_rounded(manifest: Manifest) -> bool:
    """Whether the bundle computes otherwise than the original checkpoint would in float32."""
    return is_lossy(manifest) or {manifest.precision.language, manifest.precision.vision} != {"float32"}


def loss_entries(
    pipeline: Pipeline, original: Checkpoint | None, config: CheckpointConfig, run: GreedyRun
) -> list[Parity]:
    """The bundle against the `original` checkpoint on `run`: logits, tokens, and the steps between the two.

    An entry "after" a step includes the steps before it; after the last one it is the bundle that runs.
    """
    differing = f"differing of {len(run.tokens)} greedy tokens"
    if original is None:
        reason = "the checkpoint was quantized before, and its original is not at hand"
        absent = ("logits", "relative error"), ("tokens", differing)
        return [Parity(part, run.inputs, what, None, None, reason, ORIGINAL) for part, what in absent]
    if pipeline.manifest.quantization is None:  # then it is the original that the bundle stores
        expected = run.stored
    else:
        states = streamed_states(original, config, _original_embeds(original, run), len(run.tokens))
        expected = head_logits(original, config, states)
    figures: list[tuple[str, str, float]] = [
        ("logits", "relative error", relative_error(run.logits[0], expected[0])),
        ("tokens", differing, float((expected.argmax(1) != np.array(run.tokens)).sum())),
    ]
    for name, logits in _steps(pipeline, original, config, run):
        figures.append((f"after {name}", ERROR, relative_error(logits, expected)))
        figures.append((f"after {name}", DIVERGENCE, divergence(expected, logits)))
    return [Parity(part, run.inputs, metric, value, None, None, ORIGINAL) for part, metric, value in figures]


def _steps(
    pipeline: Pipeline, original: Checkpoint, config: CheckpointConfig, run: GreedyRun
) -> Iterator[tuple[str, np.ndarray]]:
    """Name and (T, vocab) logits of each step that the bundle takes."""
    manifest = pipeline.manifest
    weights, vision = manifest.quantization, _vision(manifest)
    if weights is not None and weights.method is not None:
        dense = weights.lm_head == "dense"
        yield "int4 weights", run.stored if dense else head_logits(original, config, run.states)
    if weights is not None and weights.lm_head != "dense":
        yield f"{weights.lm_head} head", run.stored
    products, cache = _products(manifest), _cache(manifest)
    if products and cache:
        with float_cache_engine(pipeline.folder / LANGUAGE, config.language, _device(pipeline)) as engine:
            decoder = Decoder(engine, pipeline.generator.decoder.context)
            yield products, _decoder_logits(decoder, run)
    for last in (cache, products):
        if last:
            yield last, _engine_logits(pipeline, run) if vision else run.logits
            break
    if vision:
        yield vision, run.logits


def _products(manifest: Manifest) -> str:
    """What the language engine rounds beside its weights and its cache: all at once, since it is one."""
    weights, precision = manifest.quantization, manifest.precision
    found = [] if precision.language == "float32" else [f"{precision.language} products"]
    if weights is not None and weights.activations == "int8":
        found.append("int8 activations")
    return " and ".join(found)


def _cache(manifest: Manifest) -> str:
    """The cache's rounding, where it is not the activations'."""
    precision = manifest.precision
    return "" if precision.cache == precision.language else f"{precision.cache} cache"


def _vision(manifest: Manifest) -> str:
    """What the vision engine rounds."""
    if manifest.vision_quantization is not None:
        return "int8 vision"
    return "" if manifest.precision.vision == "float32" else f"{manifest.precision.vision} vision"


def _device(pipeline: Pipeline) -> str:
    return str(pipeline.language.device) if isinstance(pipeline.language, OrtEngine) else "cpu"


def _engine_logits(pipeline: Pipeline, run: GreedyRun) -> np.ndarray:
    """(T, vocab) logits of the bundle's language engine after embeddings of the unrounded vision part."""
    pipeline.forget()
    logits = _decoder_logits(pipeline.generator.decoder, run)
    pipeline.forget()
    return logits


def _decoder_logits(decoder: Decoder, run: GreedyRun) -> np.ndarray:
    prompt = len(run.sequence)
    return np.stack([decoder.prefill(run.embeds[:prompt]), *map(decoder.step, run.embeds[prompt:])])


def _original_embeds(original: Checkpoint, run: GreedyRun) -> np.ndarray:
    """The run's embeddings with rows of the original's embedding table, which the bundle may round."""
    embeds = run.embeds.copy()
    for segment in run.sequence.segments:
        content = segment.content
        if isinstance(content, PlannedImage):
            where = np.flatnonzero(content.source < 0)
            embeds[segment.start + where] = embedding_rows(original, content.tokens[where].tolist())
        else:
            embeds[segment.start : segment.stop] = embedding_rows(original, content)
    embeds[len(run.sequence) :] = embedding_rows(original, run.tokens[:-1])
    return embeds


def answer_entries(
    pipeline: Pipeline, original: Checkpoint, config: CheckpointConfig, questions: int
) -> list[Parity]:
    """Wrong answers of the `original` embedded model and of its bundle to `questions` about card images."""
    settings = pipeline.settings
    images = ImageOptions(settings.grid_mode, settings.max_slices, settings.resize, settings.roi_rounding)
    asked = model_answer(UhdModel(original.folder, config, torch.float32, images))
    inputs, metric, wrong, reason = f"{questions} card images", "wrong", None, None
    try:
        after = evaluate(lambda *both: pipeline.answer(*both, max_new_tokens=LONGEST_ANSWER), questions)
        before = evaluate(asked, questions)
    except UhdError as error:  # of a bundle whose context is too small for these questions
        reason = str(error)
    else:
        metric = f"wrong, {len(before.misses)} by the original"
        wrong = float(len(after.misses))
    return [Parity("answers", inputs, metric, wrong, None, reason, ORIGINAL)]


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """||actual - expected|| / ||expected||, computed in float64; infinite where a value is not finite."""
    difference = np.linalg.norm(actual.astype(np.float64) - expected.astype(np.float64))
    error = float(difference / np.linalg.norm(expected.astype(np.float64)))
    return error if np.isfinite(error) else float("inf")


def divergence(expected: np.ndarray, actual: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence in nats of the tokens that (T, vocab) logits predict, in float64."""
    reference, other = (_log_softmax(logits.astype(np.float64)) for logits in (expected, actual))
    return max(float((np.exp(reference) * (reference - other)).sum(1).mean()), 0.0)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
