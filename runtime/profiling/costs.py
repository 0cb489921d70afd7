"""What the model costs, by arithmetic on shapes alone: FLOPs, weights and activations by stage.

Counted are matrix products, convolutions and the weighted sums of pooling and upsampling, at 2 FLOPs
a multiply-add; norms, activations and softmax are left out, as in the paper's figures. Weights are
elements held, activations elements read and written with every operation by itself (nothing fused,
nothing cached): an upper bound on traffic. Multiply by the size of a type for bytes.

`folded=False` is the released computation as it executes: crops padded to the longest, the unused
last ViT layer, keys and values projected anew for each query set, logits at every position.
`folded=True` is the graph this project exports (docs/folding.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from uhd_export.runtime.config import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from uhd_export.runtime.image.geometry import KERNEL, bin_grid

Grid = tuple[int, int]
Parts = dict[str, "Cost"]
STAGES = ("vit", "jbu", "projector", "prefill", "decode")
QUERY_SETS = 4
GUIDANCE, RANGE = 3, 32  # channels of the JBU's guidance and of its range features
TAPS = KERNEL * KERNEL
# Bytes a weight: 4 bits, and one 16-bit scale for a group of 128.
INT4_BYTES = 0.5 + 2 / 128
# Of vision's weights those that 8 bits leave as they are: the patches', and one matrix a head or a window.
APART = ("patches", "scores", "value")


@dataclass(frozen=True)
class Cost:
    """What a computation takes: FLOPs, and elements of weights and activations that it moves."""

    flops: int = 0
    weights: int = 0
    activations: int = 0

    @property
    def elements(self) -> int:
        """Everything moved; times the size of a type, bytes."""
        return self.weights + self.activations

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops, self.weights + other.weights, self.activations + other.activations
        )


def total(parts: Parts) -> Cost:
    """The sum of `parts`."""
    return sum(parts.values(), Cost())


def _linear(rows: int, inner: int, columns: int, copies: int = 1) -> Cost:
    """`rows` vectors through `copies` weight matrices of inner x columns."""
    return Cost(
        2 * rows * inner * columns * copies, inner * columns * copies, rows * copies * (inner + columns)
    )


def _product(rows: int, inner: int, columns: int, count: int = 1) -> Cost:
    """`count` products of two activations."""
    moved = rows * inner + inner * columns + rows * columns
    return Cost(2 * rows * inner * columns * count, 0, moved * count)


def vit(grids: Sequence[Grid], vision: VisionConfig, *, folded: bool) -> Parts:
    """The vision tower over crops of `grids` (rows, columns) patches."""
    c, layers = vision.hidden, vision.layers + (not folded)
    lengths = [rows * cols + 1 for rows, cols in grids]
    if not folded:
        lengths = [max(lengths)] * len(lengths)
    patches, tokens = sum(rows * cols for rows, cols in grids), sum(lengths)
    scores = sum((_product(n, c, n) for n in lengths), Cost())
    return {
        "patches": _linear(patches, 3 * vision.patch**2, c),
        "projections": _times(_linear(tokens, c, c, copies=4), layers),
        "attention": _times(scores + scores, layers, weights=False),
        "mlp": _times(
            _linear(tokens, c, vision.intermediate) + _linear(tokens, vision.intermediate, c), layers
        ),
    }


def _times(cost: Cost, count: int, *, weights: bool = True) -> Cost:
    """`cost`, `count` times, each with weights of its own."""
    return Cost(cost.flops * count, cost.weights * count * weights, cost.activations * count)


def jbu(grids: Sequence[Grid], projector: ProjectorConfig, *, folded: bool) -> Parts:
    """The feature pyramid. Folded: bicubic doubling and the 7x7 kernel as one low-resolution stencil."""
    scales, c = projector.stages, projector.vision_hidden
    if not scales:
        return {}
    if projector.pyramid != "jbu":
        return _plain_pyramid(grids, projector)
    patches = sum(rows * cols for rows, cols in grids)
    pixels = patches * sum(scale**2 for scale in scales)
    stages = len(scales)
    parts = {
        "range": _shared(_linear(pixels, GUIDANCE, RANGE) + _linear(pixels, RANGE, RANGE), stages),
        "similarity": Cost(2 * TAPS * RANGE * pixels, 0, pixels * (RANGE + TAPS)),
        "kernel_fixup": _shared(_linear(pixels, TAPS + GUIDANCE, TAPS) + _linear(pixels, TAPS, TAPS), stages),
    }
    moved = pixels * c + pixels // 4 * c
    if folded:
        # Two products a pixel: the 7 x 7 kernel by 7 low-resolution rows, then by 7 columns.
        parts["stencil"] = Cost(2 * 2 * KERNEL**3 * pixels, 0, 2 * pixels * TAPS)
        parts["weighted_sum"] = Cost(2 * TAPS * c * pixels, 0, moved + pixels * TAPS)
    else:
        parts["bicubic"] = Cost(2 * 16 * c * pixels, 0, moved)
        parts["weighted_sum"] = Cost(2 * TAPS * c * pixels, 0, 2 * pixels * c + pixels * TAPS)
        parts["fixup"] = _linear(patches * scales[-1] ** 2, c, c)
    return parts


def _plain_pyramid(grids: Sequence[Grid], projector: ProjectorConfig) -> Parts:
    """Bilinear: matrices over rows, then columns, of each level in use. Deconvolution: a product a stage."""
    c = projector.vision_hidden
    if projector.pyramid == "deconvolution":
        patches = sum(rows * cols for rows, cols in grids)
        return {f"up{scale}x": _linear(patches * scale**2 // 4, c, 4 * c) for scale in projector.stages}
    resize = Cost()
    for rows, cols in grids:
        for scale in projector.levels[1:]:
            resize += _product(scale * rows, rows, cols * c)
            resize += _product(scale * cols, cols, c, scale * rows)
    return {"resize": resize}


def _shared(cost: Cost, stages: int) -> Cost:
    """`cost` counted over all stages at once, with weights in each."""
    return Cost(cost.flops, cost.weights * stages, cost.activations)


def projector(
    grids: Sequence[Grid], config: ProjectorConfig, *, folded: bool, grid_mode: str = "selective"
) -> Parts:
    """The projector over crops of `grids`; only Hiwin has a folded form."""
    if folded and config.kind == "hiwin":
        return _folded_hiwin(grids, config, grid_mode)
    c, d, windows = config.vision_hidden, config.hidden, config.side**2
    sets = QUERY_SETS if config.kind == "hiwin" else 1
    pixels = [sum(rows * cols for rows, cols in grids) * scale**2 for scale in config.levels]
    keys = max(keys_per_window(grid, config, grid_mode) for grid in grids)
    queries, rows = windows * len(grids) * sets, windows * len(grids) * sets * keys
    samples = windows * sum(_samples_per_window(grid, config, grid_mode) for grid in grids)
    parts = {
        "level_linear": sum((_linear(n, c, d) for n in pixels), Cost()),
        # Keys and values are pooled apart: four taps a sample each.
        "pooling": Cost(2 * 2 * 4 * samples * d, 0, 2 * (sum(pixels) + rows // sets) * d),
        "query": _linear(queries, d, d),
        "key": _linear(rows, d, d),
        "value": _linear(rows, d, d),
        "attention": Cost(2 * 2 * d * rows, 0, 2 * rows * d + 2 * queries * d),
        "out": _linear(queries, d, d),
    }
    if sets > 1:
        parts["cat"] = _linear(windows * len(grids), sets * d, d)
    parts["proj"] = _linear(windows * len(grids), d, d)
    return parts


def _folded_hiwin(grids: Sequence[Grid], config: ProjectorConfig, grid_mode: str) -> Parts:
    """The exact folding: norms and pooling in vision channels, projection after the mixing."""
    c, d, side = config.vision_hidden, config.hidden, config.side
    windows, queries, levels = side**2, QUERY_SETS * config.heads, len(config.levels)
    norm_rank = min(d, c)
    crops = len(grids)
    norm, pooling, position = Cost(), Cost(), Cost()
    for scale in config.levels:
        norm += _linear(scale**2 * sum(rows * cols for rows, cols in grids), c, norm_rank)
    for (rows, cols), count in Counter(grids).items():
        for scale in config.levels:
            bins_y, bins_x = bin_grid(rows, cols, scale, grid_mode)
            tall = _product(side * bins_y, scale * rows, scale * cols * c, count)
            wide = _product(side * bins_x, scale * cols, c, count * side * bins_y)
            pooling += tall + wide
        # Depends on the shape alone: once for all crops of a shape.
        position += _product(keys_per_window((rows, cols), config, grid_mode), windows, queries, windows)
    keys = sum(keys_per_window(grid, config, grid_mode) for grid in grids)
    outputs = windows * crops
    vectors = windows * queries
    scores = Cost(2 * keys * c * vectors, vectors * c * levels, windows * keys * (c + queries))
    mixed = Cost(2 * keys * c * vectors, 0, windows * keys * (c + queries) + crops * vectors * c * levels)
    return {
        "norm": norm,
        "pooling": pooling,
        "position": position,
        "scores": scores,
        "mixing": mixed,
        "value": Cost(
            2 * outputs * QUERY_SETS * c * d * levels,
            c * d * levels,
            outputs * QUERY_SETS * (config.heads * c * levels + d),
        ),
        "out": _linear(outputs * QUERY_SETS, d, d),
        "cat": _linear(outputs, QUERY_SETS * d, d),
        "proj": _linear(outputs, d, d),
    }


def keys_per_window(patch_grid: Grid, config: ProjectorConfig, grid_mode: str = "selective") -> int:
    """Pooled rows that a window's queries attend to."""
    bins = (bin_grid(*patch_grid, scale, grid_mode) for scale in config.levels)
    return sum(y * x for y, x in bins)


def _samples_per_window(patch_grid: Grid, config: ProjectorConfig, grid_mode: str) -> int:
    """Bilinear samples of RoIAlign in one window, all levels: ceil(window / bins) an axis and bin."""
    out = 0
    for scale in config.levels:
        bins = bin_grid(*patch_grid, scale, grid_mode)
        y, x = (
            b * -(-max(scale * n, config.side) // (config.side * b))
            for n, b in zip(patch_grid, bins, strict=True)
        )
        out += y * x
    return out


def prefill(language: LanguageConfig, positions: int, *, folded: bool) -> Parts:
    """All `positions` of a prompt at once. Folded: causal attention and the last position's logits."""
    attended = positions * (positions + 1) // 2 if folded else positions**2
    return _decoder(language, positions, attended, 1 if folded else positions)


def decode(language: LanguageConfig, past: int) -> Parts:
    """One token after `past` positions."""
    return _decoder(language, 1, past + 1, 1)


def _decoder(language: LanguageConfig, rows: int, attended: int, logits: int) -> Parts:
    """`rows` positions that attend to `attended` (query, key) pairs in all."""
    d, heads_width = language.hidden, language.heads * language.head_size
    kv_width = language.kv_heads * language.head_size
    projections = _linear(rows, d, heads_width, copies=2) + _linear(rows, d, kv_width, copies=2)
    mlp = _linear(rows, d, language.intermediate, copies=3)
    past = attended // rows
    attention = Cost(4 * attended * heads_width, 0, 2 * past * kv_width + 2 * rows * heads_width)
    return {
        "projections": _times(projections, language.layers),
        "attention": _times(attention, language.layers),
        "mlp": _times(mlp, language.layers),
        "head": _linear(logits, d, language.vocab),
    }


def kv_cache_bytes(language: LanguageConfig, positions: int, bytes_per: float = 2) -> int:
    """Bytes of the keys and values of `positions` positions, in all layers."""
    return round(cached_values(language, positions) * bytes_per)


def cached_values(language: LanguageConfig, positions: int) -> int:
    """Numbers that the cache holds of `positions` positions, in all layers."""
    return 2 * language.kv_heads * language.head_size * language.layers * positions


def stage_costs(
    grids: Sequence[Grid], model: ModelConfig, positions: int, *, folded: bool, grid_mode: str = "selective"
) -> dict[str, Parts]:
    """The parts of every stage, for crops of `grids` and a prompt of `positions` in all.

    `decode` is the first token after the prompt.
    """
    return {
        "vit": vit(grids, model.vision, folded=folded),
        "jbu": jbu(grids, model.projector, folded=folded),
        "projector": projector(grids, model.projector, folded=folded, grid_mode=grid_mode),
        "prefill": prefill(model.language, positions, folded=folded),
        "decode": decode(model.language, positions),
    }


def language_bytes(language: LanguageConfig, linear_bytes: float = 2, other_bytes: float = 2) -> int:
    """Bytes of the decoder's weights: linear layers, and embeddings with head, at these bytes a weight."""
    parts = decode(language, 0)
    linear = parts["projections"].weights + parts["mlp"].weights
    tables = language.vocab * language.hidden * (1 if language.tied else 2)
    return round(linear * linear_bytes + tables * other_bytes)
