"""Products of the vision graph in 8 bits, as ONNX Runtime and TensorRT multiply them; what they see."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from uhd_export.graph.int8.rounding import WEIGHT_LEVELS, round_weight
from uhd_export.graph.products import DenseProducts, Product, ProductFormat, bias_of
from uhd_export.plugins.graph import GraphBuilder

LOW, HIGH, ROWS = "low", "high", "rows"
# Every so manieth token is kept to measure errors on; a prime, so that no column of patches is favoured.
_STRIDE = 13


class ObservedProducts:
    """Dense products whose inputs' extremes and some rows are outputs of the graph, named "PRODUCT/low"..."""

    def __init__(self) -> None:
        self.products: dict[str, Product] = {}

    def emit(self, b: GraphBuilder, x: ir.Value, product: Product) -> ir.Value:
        """A dense product and three outputs."""
        self.products[product.name] = product
        rows = b.reshape(x, [-1, product.inputs])
        axes = b.constant([0])
        low, high = (b.op(reduce, rows, axes, keepdims=0) for reduce in ("ReduceMin", "ReduceMax"))
        some = b.op("Slice", rows, b.constant([0]), b.constant([2**31 - 1]), axes, b.constant([_STRIDE]))
        for value, part, shape in ((low, LOW, ()), (high, HIGH, ()), (some, ROWS, (f"{product.name}/n",))):
            b.output(
                value, f"{product.name}/{part}", ir.DataType.FLOAT, (*shape, product.inputs), direct=True
            )
        return DenseProducts().emit(b, x, product)


class DynamicInt8:
    """Activations are rounded at run time, one scale a tensor.

    The operators are standard; ONNX Runtime's CPU provider fuses them to DynamicQuantizeMatMul.
    """

    def emit(self, b: GraphBuilder, x: ir.Value, product: Product) -> ir.Value:
        """Integer product, scaled."""
        codes, scales = _weight(b, product, ir.DataType.FLOAT)
        rounded, scale, zero = b.ops("DynamicQuantizeLinear", x, outputs=3)
        sums = b.op("Cast", b.op("MatMulInteger", rounded, codes, zero), to=ir.DataType.FLOAT)
        return b.op("Add", b.op("Mul", sums, b.op("Mul", scale, scales)), bias_of(b, product))


class StaticInt8:
    """Activations of a calibrated range between QuantizeLinear and DequantizeLinear, as TensorRT wants them.

    `largest` is each product's largest input by magnitude.
    """

    def __init__(self, largest: Mapping[str, float]) -> None:
        self._largest = largest

    def emit(self, b: GraphBuilder, x: ir.Value, product: Product) -> ir.Value:
        """MatMul of two dequantized tensors."""
        codes, scales = _weight(b, product, product.dtype)
        scale = b.constant(self._largest[product.name] / WEIGHT_LEVELS, product.dtype.numpy())
        zero = b.constant(0, np.int8)
        x = b.op("DequantizeLinear", b.op("QuantizeLinear", x, scale, zero), scale, zero)
        weight = b.op("DequantizeLinear", codes, scales, axis=1)
        return b.op("Add", b.op("MatMul", x, weight), bias_of(b, product))


class SomeInt8:
    """The products named in 8 bits, the others dense."""

    def __init__(self, int8: ProductFormat, names: Mapping[str, float]) -> None:
        self._int8, self._names = int8, names

    def emit(self, b: GraphBuilder, x: ir.Value, product: Product) -> ir.Value:
        """By name."""
        return (self._int8 if product.name in self._names else DenseProducts()).emit(b, x, product)


def _weight(b: GraphBuilder, product: Product, dtype: ir.DataType) -> tuple[ir.Value, ir.Value]:
    """Codes and scales; the weight is read anew for each, so that none is kept."""
    name, shape = product.name, (product.inputs, product.outputs)

    def rounded() -> tuple[np.ndarray, np.ndarray]:
        return round_weight(product.weight(), dtype.numpy())

    codes = b.weight(f"{name}.codes", shape, ir.DataType.INT8, lambda: rounded()[0])
    return codes, b.weight(f"{name}.scales", shape[1:], dtype, lambda: rounded()[1])
