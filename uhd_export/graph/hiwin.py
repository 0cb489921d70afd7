"""The projectors in ONNX: released Hiwin and v1 (twins of `projector`), and folded (of `fold`)."""

import numpy as np
import onnx_ir as ir

from uhd_export.graph.weights import Weights
from uhd_export.model.folding import FoldedLevel, FoldedProjector
from uhd_export.model.projector import LN_EPS, QUERY_SETS
from uhd_export.plugins.graph import GraphBuilder
from uhd_export.plugins.window_attention.onnx_op import add_position_scores, add_window_attention
from uhd_export.plugins.window_attention.reference import Level
from uhd_export.runtime.config import HEAD_SIZE, ProjectorConfig

Geometry = dict[str, ir.Value]


def emit_folded(
    b: GraphBuilder,
    config: ProjectorConfig,
    folded: FoldedProjector,
    weights: Weights,
    maps: dict,
    geometry: Geometry,
) -> ir.Value:
    """(B, N, D) tokens from the raw JBU maps, by the folded weights."""
    inputs, cells = [], []
    for scale, level in zip(folded.scales, folded.levels, strict=True):
        name = f"folded.{scale}x."
        roi = geometry[f"roi_{scale}x_y"], geometry[f"roi_{scale}x_x"]
        cells.append((geometry[f"window_position_{scale}x_y"], geometry[f"window_position_{scale}x_x"]))
        queries = (weights.array(name + n, getattr(level, n)) for n in ("query", "query_scale", "query_mass"))
        pixel_scale = _pixel_scale(b, config, level, weights, name, maps[scale])
        inputs.append(Level(maps[scale], pixel_scale, *roi, *queries))
    position, value, value_moments = (
        weights.array(f"folded.{name}", getattr(folded, name))
        for name in ("query_position", "value", "value_moments")
    )
    position = add_position_scores(b, cells, position)
    attended = add_window_attention(b, position, value, value_moments, inputs)
    attended = b.op("Add", attended, weights.array("folded.value_bias", folded.value_bias))
    x = _affine(weights, attended, folded, "out")
    x = b.reshape(_standardise(b, weights, x, config), [0, 0, len(QUERY_SETS) * config.hidden])
    x = _standardise(b, weights, _affine(weights, x, folded, "cat"), config)
    return _affine(weights, x, folded, "proj")


def _pixel_scale(
    b: GraphBuilder, config: ProjectorConfig, level: FoldedLevel, weights: Weights, name: str, x: ir.Value
) -> ir.Value:
    """The LayerNorm's scalar of each pixel, (B, H, W), summed in float32."""
    x = weights.array_product(x, name + "norm", level.norm_weight, level.norm_bias, length_only=True)
    if weights.dtype != ir.DataType.FLOAT:
        x = b.op("Cast", x, to=ir.DataType.FLOAT)
    length = b.op("ReduceSumSquare", x, b.constant([-1]), keepdims=0)
    mean = b.op(
        "Add",
        b.op("Div", length, b.constant(float(config.hidden))),
        b.constant(level.norm_rest / config.hidden + LN_EPS),
    )
    scale = b.op("Reciprocal", b.op("Sqrt", mean))
    return scale if weights.dtype == ir.DataType.FLOAT else b.op("Cast", scale, to=weights.dtype)


def _affine(weights: Weights, x: ir.Value, folded: FoldedProjector, name: str) -> ir.Value:
    tensors = getattr(folded, f"{name}_weight"), getattr(folded, f"{name}_bias")
    return weights.array_product(x, f"folded.{name}", *tensors)


def _standardise(b: GraphBuilder, weights: Weights, x: ir.Value, config: ProjectorConfig) -> ir.Value:
    """LayerNorm without affine."""
    ones = b.constant(np.ones(config.hidden), weights.dtype.numpy())
    zeros = b.constant(np.zeros(config.hidden), weights.dtype.numpy())
    return b.op("LayerNormalization", x, ones, zeros, axis=-1, epsilon=LN_EPS)


def emit_hiwin(
    b: GraphBuilder, config: ProjectorConfig, weights: Weights, maps: dict[int, ir.Value], geometry: Geometry
) -> ir.Value:
    """(B, N, D) tokens as the released code computes them: every query set projects keys anew."""
    pairs = []
    for scale in config.levels:
        name = f"features_{scale}x_projector"
        level = weights.product(maps[scale], name)
        level = weights.layer_norm(level, "ln_kv", LN_EPS)
        embedding = b.reshape(weights.plain(f"feature_{scale}x_embedding"), [config.hidden])
        pairs.append(_keys_values(b, config, weights, level, scale, geometry, embedding))
    keys, values = (
        b.op("Concat", *part, axis=2) if len(part) > 1 else part[0] for part in zip(*pairs, strict=True)
    )
    sets = [
        weights.layer_norm(_attend(b, config, weights, f"query_{i}", keys, values), "ln_proj", LN_EPS)
        for i in QUERY_SETS
    ]
    x = b.op("Concat", *sets, axis=-1)
    x = weights.product(x, "cat_proj")
    return b.op("MatMul", weights.layer_norm(x, "ln_post", LN_EPS), weights.plain("proj"))


def emit_v1(
    b: GraphBuilder, config: ProjectorConfig, weights: Weights, features: ir.Value, geometry: Geometry
) -> ir.Value:
    """(B, N, D) tokens of the LLaVA-UHD projector, from (B, h, w, C) features."""
    level = weights.layer_norm(b.op("MatMul", features, weights.linear("kv_proj")), "ln_kv", LN_EPS)
    keys, values = _keys_values(b, config, weights, level, 1, geometry, None)
    x = weights.layer_norm(_attend(b, config, weights, "query", keys, values), "ln_post", LN_EPS)
    return b.op("MatMul", x, weights.plain("proj"))


def _keys_values(
    b: GraphBuilder,
    config: ProjectorConfig,
    weights: Weights,
    level: ir.Value,
    scale: int,
    geometry: Geometry,
    embedding: ir.Value | None,
) -> tuple[ir.Value, ir.Value]:
    """Pooled keys and values of one level's (B, H, W, D) map, (B, N, K, D) each."""
    roi = geometry[f"roi_{scale}x_y"], geometry[f"roi_{scale}x_x"]
    position = geometry[f"window_position_{scale}x_y"], geometry[f"window_position_{scale}x_x"]
    table = b.reshape(weights.plain("pos_embed"), [1, config.side, config.side, config.hidden])
    positions = _pool(b, config, table, *position)
    values = _pool(b, config, level, *roi)
    if embedding is None:
        return b.op("Add", values, positions), values
    return b.op("Add", _pool(b, config, b.op("Add", level, embedding), *roi), positions), values


def _pool(
    b: GraphBuilder, config: ProjectorConfig, maps: ir.Value, roi_y: ir.Value, roi_x: ir.Value
) -> ir.Value:
    """RoIAlign of (B, H, W, D) to (B, N, K, D), as two matrix products."""
    side, d, batch = config.side, config.hidden, b.dim(maps, 0)
    bins_y, bins_x, width = b.dim(roi_y, 1), b.dim(roi_x, 1), b.dim(maps, 2)
    tall = b.op(
        "MatMul", b.op("Reshape", roi_y, b.concat_shape(-1, b.dim(roi_y, 2))), b.reshape(maps, [0, 0, -1])
    )
    tall = b.op("Reshape", tall, b.concat_shape(batch, -1, width, d))
    both = b.op("MatMul", b.op("Reshape", roi_x, b.concat_shape(-1, width)), tall)
    both = b.op("Reshape", both, b.concat_shape(batch, side, bins_y, side, bins_x, d))
    both = b.op("Transpose", both, perm=[0, 1, 3, 2, 4, 5])
    return b.op("Reshape", both, b.concat_shape(batch, side * side, b.op("Mul", bins_y, bins_x), d))


def _attend(
    b: GraphBuilder, config: ProjectorConfig, weights: Weights, query: str, keys: ir.Value, values: ir.Value
) -> ir.Value:
    """One query a window over (B, N, K, D) keys and values, to (B, N, D)."""
    windows, heads, d = config.side**2, config.heads, config.hidden
    q = b.op("Add", weights.layer_norm(weights.plain(query), "ln_q", LN_EPS), weights.plain("pos_embed"))
    projections = b.ops("Split", weights.plain("attn.in_proj_weight"), axis=0, num_outputs=3, outputs=3)
    biases = b.ops("Split", weights.plain("attn.in_proj_bias"), axis=0, num_outputs=3, outputs=3)

    def project(x: ir.Value, i: int) -> ir.Value:
        x = b.op("MatMul", x, b.op("Transpose", projections[i], perm=[1, 0]))
        return b.op("Add", x, biases[i])

    q = b.op("Mul", project(q, 0), weights.number(HEAD_SIZE**-0.5))
    q = b.reshape(q, [1, windows, heads, 1, HEAD_SIZE])
    k = b.op("Transpose", b.reshape(project(keys, 1), [0, 0, -1, heads, HEAD_SIZE]), perm=[0, 1, 3, 4, 2])
    v = b.op("Transpose", b.reshape(project(values, 2), [0, 0, -1, heads, HEAD_SIZE]), perm=[0, 1, 3, 2, 4])
    x = b.op("MatMul", b.op("Softmax", b.op("MatMul", q, k), axis=-1), v)
    x = b.reshape(x, [0, 0, d])
    return weights.product(x, "attn.out_proj")
