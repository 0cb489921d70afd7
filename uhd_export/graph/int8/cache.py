"""Scales of a cache in 8 bits, from the keys and values of conversations."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from uhd_export.checkpoint.config import CheckpointConfig
from uhd_export.checkpoint.reader import Checkpoint
from uhd_export.graph.cache import Int8Cache, LayerScales, rounded, scales_for
from uhd_export.model.reference import CropEncoder, keys_and_values, reference_embeds
from uhd_export.runtime.bundle.manifest import CacheQuantization
from uhd_export.runtime.engines.onnxruntime import OrtEngine
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.encoder import VisionEncoder
from uhd_export.runtime.image.source import open_image
from uhd_export.runtime.language.pairs import Pair, conversation_ids
from uhd_export.runtime.language.sequence import PromptSequence, plan_image
from uhd_export.runtime.progress import Progress
from uhd_export.runtime.settings import Settings

# Other conversations hold larger numbers than the few that are seen. On nano with none 3 in 10,000 were cut
# off, and logits moved four times as far; with twice the range as far again as with this.
_ROOM = 1.5


@dataclass(frozen=True)
class CachePlan:
    """The format, and what was seen."""

    cache: Int8Cache
    record: CacheQuantization


def calibrate_cache(
    config: CheckpointConfig,
    checkpoint: Checkpoint,
    settings: Settings,
    tokenizer: Tokenizer,
    pairs: Sequence[Pair],
    vision: Path,
    progress: Progress | None = None,
) -> CachePlan:
    """Run the language model on `pairs` in float32, a layer at a time, and take the largest magnitudes.

    That range gets some room. Images are encoded by the bundle's own graph, `vision`. Keys are taken after
    rotation, as they are cached. What does not fit the context is cut off. Of the progress, each pair is a
    step, and each layer.
    """
    if not pairs:
        raise UhdError("cache int8: nothing to calibrate on; give --data with at least one pair")
    sequences: list[np.ndarray] = []
    total = len(pairs) + config.language.layers
    tell = progress or (lambda done, total: None)
    with OrtEngine(vision) as engine:
        encoder = _OneByOne(VisionEncoder(engine, config.model, roi_rounding=settings.roi_rounding))
        for pair in pairs:
            tell(len(sequences), total)
            sequences.append(_embeds(checkpoint, encoder, settings, config, tokenizer, pair))
    scales: list[LayerScales] = []
    errors: list[list[float]] = [[], []]
    for index, layer in enumerate(keys_and_values(checkpoint, config.language, sequences)):
        tell(len(pairs) + index, total)
        steps = []
        for part, found in enumerate(zip(*layer, strict=True)):
            largest = np.max([np.abs(array).max(axis=1) for array in found], axis=0)
            steps.append(scales_for(_ROOM * largest))
            errors[part].append(_error(found, steps[-1]))
        scales.append(LayerScales(*steps))
    positions = sum(map(len, sequences))
    record = CacheQuantization(len(sequences), positions, max(errors[0]), max(errors[1]))
    return CachePlan(Int8Cache(scales), record)


class _OneByOne:
    """The encoder, a crop at a time."""

    def __init__(self, encoder: VisionEncoder) -> None:
        self._encoder = encoder

    def encode(self, crop: np.ndarray, grid_mode: str) -> np.ndarray:
        """See `CropEncoder.encode`."""
        return np.asarray(self._encoder.encode([crop], grid_mode)[0], np.float32)


def _embeds(
    checkpoint: Checkpoint,
    vision: CropEncoder,
    settings: Settings,
    config: CheckpointConfig,
    tokenizer: Tokenizer,
    pair: Pair,
) -> np.ndarray:
    """float32 (S, D) of the whole conversation."""
    ids, _ = conversation_ids(tokenizer, pair, settings.template, next(iter(config.language.eos), None))
    try:
        images = [plan_image(open_image(image), settings, config.model) for image in pair.images]
        sequence = PromptSequence(ids, images)
    except UhdError as error:
        raise UhdError(f"{pair.where}: {error}") from None
    return reference_embeds(checkpoint, vision, sequence)[: settings.context]


def _error(arrays: Iterable[np.ndarray], scales: np.ndarray) -> float:
    """||q(x) - x|| / ||x|| of (heads, S, size) arrays."""
    wrong = total = 0.0
    for array in arrays:
        wrong += float(np.square(rounded(array, scales[:, None]) - array, dtype=np.float64).sum())
        total += float(np.square(array, dtype=np.float64).sum())
    return float(np.sqrt(wrong / total)) if total else 0.0
