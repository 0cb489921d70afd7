"""CLIP's ConvNeXt-L as an encoder, counted: what the paper's Table 3 sets beside pyramids on a ViT."""

from collections.abc import Sequence

from uhd_export.runtime.profiling.costs import Cost, Parts

WIDTHS, DEPTHS = (192, 384, 768, 1536), (3, 3, 27, 3)
STRIDES = (4, 8, 16, 32)
# The stages whose maps are levels 0, 1 and 2, coarse to fine: strides 32, 16 and 8.
LEVELS = (3, 2, 1)
_KERNEL, _EXPANSION = 7, 4
Size = tuple[int, int]


def convnext_parts(crops: Sequence[Size]) -> Parts:
    """Stem and stages over crops of (height, width) pixels: depthwise 7 x 7, then a pointwise MLP."""
    parts: Parts = {}
    for stage, (width, depth, stride) in enumerate(zip(WIDTHS, DEPTHS, STRIDES, strict=True)):
        pixels = _pixels(crops, stride)
        inputs = 3 * 16 if stage == 0 else WIDTHS[stage - 1] * 4
        down = Cost(2 * pixels * inputs * width, inputs * width, pixels * (inputs + width))
        taps = _KERNEL * _KERNEL
        depthwise = Cost(2 * pixels * taps * width, taps * width, 2 * pixels * width)
        inner = _EXPANSION * width
        mlp = Cost(4 * pixels * width * inner, 2 * width * inner, 2 * pixels * (width + inner))
        block = depthwise + mlp
        parts[f"stage{stage + 1}"] = down + sum((block for _ in range(depth)), Cost())
    return parts


def level_linear(crops: Sequence[Size], hidden: int) -> Cost:
    """Each level's map into the language model's width."""
    cost = Cost()
    for stage in LEVELS:
        pixels, width = _pixels(crops, STRIDES[stage]), WIDTHS[stage]
        cost += Cost(2 * pixels * width * hidden, width * hidden, pixels * (width + hidden))
    return cost


def _pixels(crops: Sequence[Size], stride: int) -> int:
    """Positions of a map of `stride`, over all crops."""
    return sum((height // stride) * (width // stride) for height, width in crops)
