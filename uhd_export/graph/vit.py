"""The vision tower in ONNX: the twin of `uhd_export.model.vit`."""

from collections.abc import Callable

import onnx_ir as ir

from uhd_export.graph.weights import Weights
from uhd_export.plugins.graph import CONTRIB_DOMAIN, GraphBuilder
from uhd_export.runtime.config import VisionConfig

Attend = Callable[[GraphBuilder, VisionConfig, Weights, ir.Value], ir.Value]


def emit_vit(
    b: GraphBuilder,
    config: VisionConfig,
    weights: Weights,
    pixels: ir.Value,
    geometry: dict[str, ir.Value],
    *,
    contrib: bool,
) -> ir.Value:
    """(B, 3, 14h, 14w) pixels to (B, h, w, C) features of the last layer but one.

    `contrib` attends by ONNX Runtime's own operator, which keeps no scores in memory.
    """
    batch, rows, cols = b.dim(pixels, 0), b.dim(geometry["position_y"], 0), b.dim(geometry["position_x"], 0)
    patches = _patches(b, config, weights, pixels, (batch, rows, cols))
    x = b.op("Add", patches, _positions(b, config, weights, geometry))
    x = weights.layer_norm(x, "pre_layrnorm", config.eps)
    for i in range(config.layers):
        with b.scope(f"layer{i}"):
            x = _layer(b, config, weights, x, f"encoder.layers.{i}", _attend_contrib if contrib else _attend)
    x = b.op("Slice", x, b.constant([1]), b.constant([2**31 - 1]), b.constant([1]))
    return b.op("Reshape", x, b.concat_shape(batch, rows, cols, config.hidden))


def _patches(
    b: GraphBuilder,
    config: VisionConfig,
    weights: Weights,
    pixels: ir.Value,
    shape: tuple[ir.Value, ir.Value, ir.Value],
) -> ir.Value:
    """Class token and patches, (B, 1 + h*w, C), where `shape` is (B, h, w).

    A convolution whose stride is its kernel is a product over patches; as one it needs no cuDNN.
    """
    batch, rows, cols = shape
    x = b.op("Reshape", pixels, b.concat_shape(batch, 3, rows, config.patch, cols, config.patch))
    x = b.op("Transpose", x, perm=[0, 2, 4, 1, 3, 5])
    x = b.op("Reshape", x, b.concat_shape(batch, b.op("Mul", rows, cols), 3 * config.patch**2))
    x = b.op("MatMul", x, weights.linear("embeddings.patch_embedding"))
    cls = b.op("Expand", weights.plain("embeddings.class_embedding"), b.concat_shape(batch, 1, config.hidden))
    return b.op("Concat", cls, x, axis=1)


def _positions(
    b: GraphBuilder, config: VisionConfig, weights: Weights, geometry: dict[str, ir.Value]
) -> ir.Value:
    """The position table at the crop's patches, (1 + h*w, C), by two separable products."""
    table = weights.plain("embeddings.position_embedding.weight")
    cls, patches = b.ops("Split", table, b.constant([1, config.table**2]), axis=0, outputs=2)
    y, x = geometry["position_y"], geometry["position_x"]
    patches = b.op("MatMul", y, b.reshape(patches, [config.table, -1]))
    patches = b.op("MatMul", x, b.reshape(patches, [-1, config.table, config.hidden]))
    return b.op("Concat", cls, b.reshape(patches, [-1, config.hidden]), axis=0)


def _layer(
    b: GraphBuilder, config: VisionConfig, weights: Weights, x: ir.Value, name: str, attend: Attend
) -> ir.Value:
    y = weights.layer_norm(x, f"{name}.layer_norm1", config.eps)
    qkv = weights.product(y, *(f"{name}.self_attn.{part}_proj" for part in "qkv"))
    x = b.op("Add", x, weights.product(attend(b, config, weights, qkv), f"{name}.self_attn.out_proj"))
    y = weights.layer_norm(x, f"{name}.layer_norm2", config.eps)
    y = weights.product(y, f"{name}.mlp.fc1")
    y = b.op("Mul", y, b.op("Sigmoid", b.op("Mul", y, weights.number(1.702))))  # quick_gelu
    return b.op("Add", x, weights.product(y, f"{name}.mlp.fc2"))


def _attend(b: GraphBuilder, config: VisionConfig, weights: Weights, qkv: ir.Value) -> ir.Value:
    """Self-attention of (B, S, 3C), q, k and v side by side, to (B, S, C), in standard operators."""
    size = config.hidden // config.heads
    qkv = b.reshape(qkv, [0, 0, 3, config.heads, size])
    qkv = b.op("Transpose", qkv, perm=[2, 0, 3, 1, 4])
    q, k, v = (
        b.op("Squeeze", part, b.constant([0]))
        for part in b.ops("Split", qkv, axis=0, num_outputs=3, outputs=3)
    )
    q = b.op("Mul", q, weights.number(size**-0.5))
    scores = b.op("Softmax", b.op("MatMul", q, b.op("Transpose", k, perm=[0, 1, 3, 2])), axis=-1)
    x = b.op("Transpose", b.op("MatMul", scores, v), perm=[0, 2, 1, 3])
    return b.reshape(x, [0, 0, config.hidden])


def _attend_contrib(b: GraphBuilder, config: VisionConfig, weights: Weights, qkv: ir.Value) -> ir.Value:
    """The same in one operator, whose kernels go through keys in blocks that fit a cache."""
    q, k, v = b.ops("Split", qkv, axis=2, num_outputs=3, outputs=3)
    heads, scale = config.heads, (config.hidden // config.heads) ** -0.5
    return b.op("MultiHeadAttention", q, k, v, domain=CONTRIB_DOMAIN, num_heads=heads, scale=scale)
