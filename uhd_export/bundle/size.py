"""What a bundle will take, from a model's sizes and the options it is built with, before it is built."""

from dataclasses import dataclass, replace

import numpy as np

from uhd_export.bundle.options import BuildOptions
from uhd_export.checkpoint.int4.linears import head_group, largest_group
from uhd_export.graph.int4.options import AUTO
from uhd_export.runtime.choices import HEADS
from uhd_export.runtime.config import LanguageConfig, ModelConfig
from uhd_export.runtime.planning.memory import PACKED_INT4, Layout, Weights
from uhd_export.runtime.profiling.costs import APART, decode, jbu, projector, total, vit

# Its matrices are the same for each shape of crop.
_GRID = [(24, 24)]
# Graphs, manifest, tokenizer.
_OTHER_FILES = 3_000_000


@dataclass(frozen=True)
class BundleSize:
    """Bytes of weights as they are stored and as they lie in memory, how they run, and the whole on disk."""

    stored: Weights
    resident: Weights
    layout: Layout
    disk: int
    integer_vision: bool
    integer_language: bool


def bundle_size(model: ModelConfig, options: BuildOptions, device: str) -> BundleSize:
    """Of a bundle of `model`, which runs on `device`, "cpu" or "cuda"."""
    item = np.dtype(options.precision).itemsize
    language, four_bits = model.language, options.weights.weights.startswith("int4")
    head = options.weights.lm_head
    if head == AUTO:
        head = "int8" if four_bits and options.engines is None else "dense"
    vision8 = options.vision_weights == "int8"
    stored = Weights(
        vision=vision_bytes(model, options),
        language=_linears(language, item, four_bits),
        head=_head(language, item, HEADS[head]),
        embeddings=language.vocab * language.hidden * (2 if four_bits else item),
    )
    wide = 4 // item if device == "cpu" else 1  # a processor multiplies dense float16 in float32
    resident = replace(
        stored,
        vision=stored.vision * wide,
        language=round(stored.language * (PACKED_INT4 if device == "cpu" else 1))
        if four_bits
        else stored.language * wide,
        head=stored.head * (wide if HEADS[head] is None else 1),
    )
    layout = Layout(
        4 if device == "cpu" else item,
        np.dtype(options.cache_type).itemsize,
        device,
        options.fold and model.projector.kind == "hiwin",
        options.images.grid_mode,
    )
    disk = stored.resident + stored.embeddings + _OTHER_FILES
    return BundleSize(stored, resident, layout, disk, vision8, four_bits)


def vision_bytes(model: ModelConfig, options: BuildOptions) -> int:
    """Of the vision part's weights as they are stored."""
    item = np.dtype(options.precision).itemsize
    folded = options.fold and model.projector.kind == "hiwin"
    parts = vit(_GRID, model.vision, folded=True) | jbu(_GRID, model.projector, folded=folded)
    heads = projector(_GRID, model.projector, folded=folded)
    every = total(parts).weights + total(heads).weights
    tables = (model.vision.table**2 + 1) * model.vision.hidden
    if folded:  # each query's score of each cell of the position table
        tables += model.projector.side**4 * 4 * model.projector.heads
    if options.vision_weights != "int8":
        return (every + tables) * item
    apart = sum(cost.weights for name, cost in (parts | heads).items() if name in APART) + tables
    return apart * item + every - (apart - tables)


def _linears(language: LanguageConfig, item: int, four_bits: bool) -> int:
    parts = decode(language, 0)
    count = parts["projections"].weights + parts["mlp"].weights
    # The rotary tables, as long as the context.
    tables = language.context * language.head_size * item
    if not four_bits:
        return count * item + tables
    return count // 2 + count // largest_group(language) * item + tables


def _head(language: LanguageConfig, item: int, bits: int | None) -> int:
    count = language.vocab * language.hidden
    return count * item if bits is None else count * bits // 8 + count // head_group(language) * item
