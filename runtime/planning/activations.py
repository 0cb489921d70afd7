"""The most that tensors between the weights take at a time, in elements, from shapes alone.

Each stage of a graph has a few places where much is alive together; the largest counts. The places were found
by following ONNX Runtime's order of execution, node by node, on nano and on the real sizes.
"""

from collections import Counter
from collections.abc import Iterator

from uhd_export.runtime.config import LanguageConfig, ModelConfig, ProjectorConfig
from uhd_export.runtime.image.encoder import batch_size
from uhd_export.runtime.image.geometry import bin_grid
from uhd_export.runtime.image.slicing import SlicePlan

Grid = tuple[int, int]
# Freed memory that the next tensor does not fit into, and scratch of kernels, over what is alive.
SLACK = 1.1
_QUERY_SETS = 4
# The JBU's tiles: 8 x 8 pixels with 3 around them, and their 7 x 7 taps; 32 channels to compare by.
_TILE, _HALO, _TAPS, _RANGE, _WINDOW = 8, 14, 49, 32, 10


def vision_elements(
    plan: SlicePlan, model: ModelConfig, *, fold: bool, grid_mode: str, rows: int | None
) -> int:
    """Of the largest run of the crops of `plan`; `rows` as in `batch_size`."""
    return max(
        min(batch_size(grid, rows), count)
        * max(crop_elements(grid, model, fold=fold, grid_mode=grid_mode).values())
        for grid, count in Counter(plan.patch_grids).items()
    )


def crop_elements(grid: Grid, model: ModelConfig, *, fold: bool, grid_mode: str) -> dict[str, int]:
    """Of one crop of `grid` (rows, columns) patches, by place."""
    vision = model.vision
    tokens = grid[0] * grid[1] + 1
    places = {
        # With its scores, which graphs of standard operators alone hold.
        "vit attention": 2 * vision.heads * tokens**2 + 2 * tokens * vision.hidden,
        "vit mlp": 2 * tokens * vision.intermediate + 2 * tokens * vision.hidden,
    }
    if model.projector.pyramid == "jbu":
        places |= dict(_jbu(grid, model.projector))
    return places | dict(_projector(grid, model.projector, fold, grid_mode))


def _below(grid: Grid, projector: ProjectorConfig, scale: int) -> int:
    """The maps of the scales below `scale`."""
    pixels = sum(other**2 for other in projector.scales if other < scale) * grid[0] * grid[1]
    return pixels * projector.vision_hidden


def _jbu(grid: Grid, projector: ProjectorConfig) -> Iterator[tuple[str, int]]:
    channels = projector.vision_hidden
    for scale in projector.stages:
        height, width = grid[0] * scale, grid[1] * scale
        tiles = -(-height // _TILE) * -(-width // _TILE)
        window = min(_WINDOW, height // 2) * min(_WINDOW, width // 2)
        below = _below(grid, projector, scale)
        low = tiles * window * channels  # what each tile reads of the map below, gathered first
        similarity = tiles * (_HALO**2 * (_TILE**2 + _RANGE) + _TILE**2 * _RANGE)
        out = tiles * _TILE**2 * channels
        yield f"jbu {scale}x similarity", below + low + similarity
        yield f"jbu {scale}x product", below + low + out + tiles * _TILE**2 * window
        yield f"jbu {scale}x tiles", below + out + height * width * channels


def _projector(
    grid: Grid, projector: ProjectorConfig, fold: bool, grid_mode: str
) -> Iterator[tuple[str, int]]:
    channels, hidden, windows = projector.vision_hidden, projector.hidden, projector.side**2
    scales, top = projector.scales, max(projector.levels)
    pixels, below = grid[0] * grid[1] * top**2, _below(grid, projector, top)
    maps = below + pixels * channels
    keys = sum(y * x for y, x in (bin_grid(*grid, scale, grid_mode) for scale in projector.levels))
    sets = _QUERY_SETS if projector.kind == "hiwin" else 1
    if fold and projector.kind == "hiwin":
        # The norm's linear map and its sum with the bias, beside the maps; then one level's mixed rows, and
        # what all levels made of theirs.
        yield "hiwin norm", maps + 2 * pixels * min(hidden, channels + 1)
        mixed = windows * sets * projector.heads * channels
        terms = 2 * len(projector.levels) * windows * sets * hidden
        first = bin_grid(*grid, projector.levels[0], grid_mode)
        yield "hiwin mixing", mixed + terms + windows * first[0] * first[1] * channels
    else:
        yield "projector levels", maps + 3 * pixels * hidden
        yield "projector keys", (len(scales) + 3) * windows * keys * hidden


def language_elements(
    language: LanguageConfig, new: int, total: int, scores: float = 1, *, widened: bool = False
) -> int:
    """Of a run of `new` positions, the last of `total`; attention holds its scores `scores` times.

    Where the cache is `widened`, a layer's keys and values are turned into floats, and are held once more
    with those of the run behind them.
    """
    d, width = language.hidden, language.heads * language.head_size
    qkv = width + 2 * language.kv_heads * language.head_size
    # Attention: the joint product and its parts turned, every head's scores, the result; the input and
    # its norm beside them.
    attention = new * (2 * qkv + width + 2 * d) + round(scores * language.heads * new * total)
    if widened:
        attention += 4 * total * language.kv_heads * language.head_size
    mlp = new * (4 * language.intermediate + 2 * d)  # gate and up, joint and apart
    return max(attention, mlp) + language.vocab
