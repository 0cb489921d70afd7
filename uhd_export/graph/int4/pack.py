"""Quantized weights as backends store them."""

import numpy as np

from uhd_export.checkpoint.int4.weight import QuantizedWeight
from uhd_export.runtime.errors import UhdError


def matmul_nbits(weight: QuantizedWeight) -> dict[str, np.ndarray]:
    """The constant inputs of ONNX Runtime's com.microsoft MatMulNBits.

    `B` (N, G, group * bits / 8) uint8, `scales` (N, G) float32 and `zero_points` (N, ceil(G * bits / 8))
    uint8, which may be left out where all are the operator's default 2**(bits-1). Low bits come first.
    """
    n, groups = weight.scales.shape
    blocks = weight.codes.reshape(n, groups, weight.group)
    pack = _nibbles if weight.bits == 4 else np.asarray
    return {"B": pack(blocks), "scales": weight.scales, "zero_points": pack(weight.zeros)}


def _nibbles(values: np.ndarray) -> np.ndarray:
    """(..., L) uint8 below 16 to (..., ceil(L / 2)): two a byte, the low half first, odd lengths padded."""
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros((*values.shape[:-1], 1), np.uint8)], -1)
    return values[..., 0::2] | values[..., 1::2] << 4


def int4_dequantize(weight: QuantizedWeight, name: str) -> dict[str, np.ndarray]:
    """The inputs of an INT4 DequantizeLinear over blocks of axis 0, without zero points, as TensorRT needs.

    `x` (K, N) int8 from -8 to 7, to be stored as INT4, and `scale` (G, N) float32.
    Raises UhdError where a zero point is not the middle of the range.
    """
    if weight.bits != 4 or not weight.symmetric:
        raise UhdError(
            f"{name}: TensorRT multiplies symmetric 4-bit weights only; quantize the checkpoint with sym=True"
        )
    return {
        "x": np.ascontiguousarray(weight.codes.T.view(np.int8) - np.int8(8)),
        "scale": np.ascontiguousarray(weight.scales.T),
    }
