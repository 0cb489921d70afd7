"""Group-quantized weights: rounding, GPTQ checkpoints, and how ONNX Runtime and TensorRT store them."""

from uhd_export.int4.checkpoint import GptqCheckpoint, open_checkpoint
from uhd_export.int4.choose import WeightOptions, linear_format, resolve
from uhd_export.int4.formats import ByName, GptqWeights, Int4Dequantize, MatMulNBits, RoundedWeights
from uhd_export.int4.linears import largest_group, layer_linears, linear_shapes
from uhd_export.int4.view import RoundedView, as_stored
from uhd_export.int4.weight import GROUP_SIZES, QuantizedWeight, check_group, round_to_nearest

__all__ = [
    "GROUP_SIZES",
    "ByName",
    "GptqCheckpoint",
    "GptqWeights",
    "Int4Dequantize",
    "MatMulNBits",
    "QuantizedWeight",
    "RoundedView",
    "RoundedWeights",
    "WeightOptions",
    "as_stored",
    "check_group",
    "largest_group",
    "layer_linears",
    "linear_format",
    "linear_shapes",
    "open_checkpoint",
    "resolve",
    "round_to_nearest",
]
