"""The PyTorch reference a part at a time, so that a bundle can be checked where the whole model does not fit.

The vision part is loaded alone; the language model runs layer by layer, each layer's weights read
when it is due and dropped after it. Both compute in float32.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional as F

from uhd_export.checkpoint.config import CheckpointConfig
from uhd_export.checkpoint.reader import PROJECTOR_PREFIX, VISION_PREFIX, Checkpoint
from uhd_export.model.language import Cache, DecoderLayer, RMSNorm, rotary_tables
from uhd_export.model.projector import HiwinProjector, V1Projector
from uhd_export.model.vit import VisionTower
from uhd_export.runtime.config import LanguageConfig
from uhd_export.runtime.image.pixels import cut, normalise
from uhd_export.runtime.language.sequence import PlannedImage, PromptSequence

_EMBED_TOKENS = "model.embed_tokens.weight"


class VisionReference:
    """Vision tower and projector as released, in float32."""

    def __init__(
        self, checkpoint: Checkpoint, config: CheckpointConfig, *, roi_rounding: str = "exact"
    ) -> None:
        self._config, self._roi_rounding = config, roi_rounding
        kinds = {"hiwin": HiwinProjector, "v1": V1Projector}
        with torch.device("meta"):
            self._tower = VisionTower(config.vision)
            self._projector = kinds[config.projector.kind](config.projector)
        checkpoint.load_into(self._tower, VISION_PREFIX, torch.float32)
        checkpoint.load_into(self._projector, PROJECTOR_PREFIX, torch.float32)

    @torch.inference_mode()
    def encode(self, crop: np.ndarray, grid_mode: str) -> np.ndarray:
        """float32 (tokens, D) of one uint8 (h, w, 3) crop."""
        patch = self._config.vision.patch
        geometry = self._config.model.geometry(
            crop.shape[0] // patch,
            crop.shape[1] // patch,
            grid_mode=grid_mode,
            roi_rounding=self._roi_rounding,
        )
        tensors = {name: torch.from_numpy(matrix) for name, matrix in geometry.items()}
        pixels = torch.from_numpy(normalise(crop))[None]
        return self._projector(self._tower(pixels, tensors), pixels, tensors)[0].numpy()


class CropEncoder(Protocol):
    """What makes tokens of a crop."""

    def encode(self, crop: np.ndarray, grid_mode: str) -> np.ndarray:
        """float32 (tokens, D) of one uint8 (h, w, 3) crop."""


def reference_embeds(checkpoint: Checkpoint, vision: CropEncoder, sequence: PromptSequence) -> np.ndarray:
    """float32 (S, D) embeddings of `sequence`, whose images `vision` encodes."""
    table = checkpoint.tensor(_EMBED_TOKENS)
    pieces = []
    for segment in sequence.segments:
        planned = segment.content
        if not isinstance(planned, PlannedImage):
            pieces.append(table[list(planned)].float())
            continue
        crops = [vision.encode(crop, planned.grid_mode) for crop in cut(planned.image, planned.plan)]
        rows = torch.from_numpy(np.concatenate(crops)[np.maximum(planned.source, 0)])
        separators = torch.from_numpy(planned.source < 0)
        rows[separators] = table[torch.from_numpy(planned.tokens)[separators]].float()
        pieces.append(rows)
    return torch.cat(pieces).numpy()


@torch.inference_mode()
def streamed_states(
    checkpoint: Checkpoint, config: CheckpointConfig, embeds: np.ndarray, last: int
) -> np.ndarray:
    """float32 (last, D), what the head takes at the `last` positions of (S, D) embeddings."""
    language = config.language
    tables = rotary_tables(language, torch.arange(len(embeds)))
    x = torch.from_numpy(embeds)[None]
    for index in range(language.layers):
        x = _layer(checkpoint, language, index)(x, *tables, [None], 0)
    with torch.device("meta"):
        norm = RMSNorm(language.hidden, language.eps)
    checkpoint.load_into(norm, "model.norm.", torch.float32)
    return norm(x[0, -last:]).numpy()


@torch.inference_mode()
def head_logits(checkpoint: Checkpoint, config: CheckpointConfig, states: np.ndarray) -> np.ndarray:
    """float32 (T, vocab) logits of (T, D) `streamed_states`."""
    head = checkpoint.tensor(checkpoint.head(config.language.tied), torch.float32)
    return F.linear(torch.from_numpy(states), head).numpy()


@torch.inference_mode()
def keys_and_values(
    checkpoint: Checkpoint, language: LanguageConfig, sequences: Sequence[np.ndarray]
) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """Layer by layer, what each of `sequences`, (S, D) embeddings, leaves in the cache.

    float32 (kv_heads, S, head_size) each: rotated keys, and values. One layer is in memory at
    a time.
    """
    states = [torch.from_numpy(embeds)[None] for embeds in sequences]
    for index in range(language.layers):
        layer, found = _layer(checkpoint, language, index), []
        for i, x in enumerate(states):
            cache: Cache = [None]
            states[i] = layer(x, *rotary_tables(language, torch.arange(x.shape[1])), cache, 0)
            assert cache[0] is not None
            key, value = cache[0]
            found.append((key[0].numpy(), value[0].numpy()))
        yield found


def _layer(checkpoint: Checkpoint, language: LanguageConfig, index: int) -> DecoderLayer:
    with torch.device("meta"):
        layer = DecoderLayer(language)
    checkpoint.load_into(layer, f"model.layers.{index}.", torch.float32)
    return layer


def embedding_rows(checkpoint: Checkpoint, ids: Sequence[int]) -> np.ndarray:
    """float32 (S, D) rows of the embedding table."""
    return checkpoint.tensor(_EMBED_TOKENS)[list(ids)].float().numpy()
