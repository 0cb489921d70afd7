"""`uhd.WindowAttention` in ONNX: the node, and its function body. Letters as in `reference`."""

from collections.abc import Sequence

import onnx_ir as ir

from uhd_export.plugins.graph import PLUGIN_DOMAIN, GraphBuilder
from uhd_export.plugins.window_attention.launch import SETS
from uhd_export.plugins.window_attention.reference import Level

OP = "WindowAttention"


def add_window_attention(
    b: GraphBuilder,
    position: ir.Value,
    value: ir.Value,
    value_moments: ir.Value,
    levels: Sequence[Level[ir.Value]],
) -> ir.Value:
    """Add a `uhd.WindowAttention` node and its body for this number of levels; (B, N, sets, heads * size)."""
    b.add_function(_body(len(levels)))
    inputs = [position, value, value_moments, *(part for level in levels for part in level)]
    return b.op(OP, *inputs, domain=PLUGIN_DOMAIN, levels=len(levels))


def add_position_scores(
    b: GraphBuilder, cells: Sequence[tuple[ir.Value, ir.Value]], query_position: ir.Value
) -> ir.Value:
    """Nodes for `reference.position_scores`."""
    outers = [_outer(b, y, x) for y, x in cells]
    rows = b.op("Concat", *outers, axis=1) if len(outers) > 1 else outers[0]
    return b.op("MatMul", rows, query_position)


def _body(levels: int) -> ir.Function:
    b = GraphBuilder(OP, function=True)
    position, value, value_moments = (b.input(name) for name in ("position", "value", "value_moments"))
    inputs = [Level(*(b.input(f"{name}_{i}") for name in Level._fields)) for i in range(levels)]
    batch, windows, heads = b.dim(inputs[0].features, 0), b.dim(position, 0), b.dim(value, 1)
    pooled, moments, scores = [], [], []
    for level in inputs:
        rows, extra = _pool_level(b, level)
        pooled.append(rows)
        moments.append(extra)
        scores.append(_scores(b, level, rows, extra))
    joined = b.op("Concat", *scores, axis=2) if levels > 1 else scores[0]
    weights = b.op("Softmax", b.op("Add", joined, b.op("Unsqueeze", position, b.constant([1]))), axis=2)
    # (N, B, K, Q) to (heads, N, B, sets, K): heads outermost, so that the value projection is one
    # batched product.
    keys = b.dim(weights, 2)
    weights = b.op("Reshape", weights, b.concat_shape(windows, batch, keys, heads, SETS))
    weights = b.op("Transpose", weights, perm=[3, 0, 1, 4, 2])
    lengths = b.op("Concat", *(b.dim(rows, 2) for rows in pooled), axis=0)
    parts = b.ops("Split", weights, lengths, axis=4, outputs=levels)
    values, values_moments = (
        b.ops("Split", tensor, axis=0, num_outputs=levels, outputs=levels)
        for tensor in (value, value_moments)
    )
    sums: list[ir.Value] = []  # (heads, N * B * sets, size), one term more each
    for i in range(levels):
        for rows, by in ((pooled[i], values[i]), (moments[i], values_moments[i])):
            mixed = b.op("MatMul", parts[i], rows)
            flat = b.op("Reshape", mixed, b.concat_shape(heads, -1, b.dim(by, 2)))
            term = b.op("MatMul", flat, b.op("Squeeze", by, b.constant([0])))
            sums.append(b.op("Add", sums[-1], term) if sums else term)
    size = b.dim(value, 3)
    attended = b.op("Reshape", sums[-1], b.concat_shape(heads, windows, batch, SETS, size))
    attended = b.op("Transpose", attended, perm=[2, 1, 3, 0, 4])
    shape = b.concat_shape(batch, windows, SETS, b.op("Mul", heads, size))
    b.output(b.op("Reshape", attended, shape), "attended")
    return b.function([ir.Attr("levels", ir.AttributeType.INT, levels)])


def _pool(b: GraphBuilder, maps: ir.Value, roi_y: ir.Value, roi_x: ir.Value) -> ir.Value:
    """RoIAlign of (B, H, W, c) to (N, B, K, c), as two matrix products."""
    batch, channels, width = b.dim(maps, 0), b.dim(maps, 3), b.dim(maps, 2)
    side, bins_y, bins_x = b.dim(roi_y, 0), b.dim(roi_y, 1), b.dim(roi_x, 1)
    flat = b.op("Reshape", maps, b.constant([0, 0, -1]))
    tall = b.op("MatMul", b.op("Reshape", roi_y, b.concat_shape(-1, b.dim(roi_y, 2))), flat)
    tall = b.op("Reshape", tall, b.concat_shape(batch, -1, width, channels))
    both = b.op("MatMul", b.op("Reshape", roi_x, b.concat_shape(-1, width)), tall)
    both = b.op("Reshape", both, b.concat_shape(batch, side, bins_y, side, bins_x, channels))
    both = b.op("Transpose", both, perm=[1, 3, 0, 2, 4, 5])
    windows, keys = b.op("Mul", side, side), b.op("Mul", bins_y, bins_x)
    return b.op("Reshape", both, b.concat_shape(windows, batch, keys, channels))


def _outer(b: GraphBuilder, y: ir.Value, x: ir.Value) -> ir.Value:
    """(side, bins_y, n) and (side, bins_x, m) to (N, K, n * m)."""
    side, keys = b.dim(y, 0), b.op("Mul", b.dim(y, 1), b.dim(x, 1))
    cells = b.op("Mul", b.dim(y, 2), b.dim(x, 2))
    product = b.op(
        "Mul", b.op("Unsqueeze", y, b.constant([1, 3, 5])), b.op("Unsqueeze", x, b.constant([0, 2, 4]))
    )
    return b.op("Reshape", product, b.concat_shape(b.op("Mul", side, side), keys, cells))


def _pool_level(b: GraphBuilder, level: Level[ir.Value]) -> tuple[ir.Value, ir.Value]:
    """Pooled scaled features (N, B, K, C), and pooled scale and mass (N, B, K, 2)."""
    last = b.constant([-1])
    scale = b.op("Unsqueeze", level.scale, last)
    rows = _pool(b, b.op("Mul", level.features, scale), level.roi_y, level.roi_x)
    pooled_scale = _pool(b, scale, level.roi_y, level.roi_x)
    mass = _outer(b, *(b.op("ReduceSum", roi, last, keepdims=1) for roi in (level.roi_y, level.roi_x)))
    mass = b.op("Expand", b.op("Unsqueeze", mass, b.constant([1])), b.op("Shape", pooled_scale))
    return rows, b.op("Concat", pooled_scale, mass, axis=-1)


def _scores(b: GraphBuilder, level: Level[ir.Value], rows: ir.Value, extra: ir.Value) -> ir.Value:
    """Scores (N, B, K, Q) of one level's pooled rows, but for the positions'."""
    windows, batch, keys = (b.dim(rows, axis) for axis in range(3))
    # All crops of a window in one product: (N, B*K, C) @ (N, C, Q).
    merged = b.op("Reshape", rows, b.concat_shape(windows, -1, b.dim(rows, 3)))
    score = b.op("MatMul", merged, level.query)
    other = b.op(
        "Concat",
        *(b.op("Unsqueeze", q, b.constant([1])) for q in (level.query_scale, level.query_mass)),
        axis=1,
    )
    merged = b.op("Reshape", extra, b.concat_shape(windows, -1, 2))
    score = b.op("Add", score, b.op("MatMul", merged, other))
    return b.op("Reshape", score, b.concat_shape(windows, batch, keys, b.dim(level.query, 2)))
