"""Dense products of the vision graph, and how a format stores and multiplies them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir

from uhd_export.plugins.graph import GraphBuilder


@dataclass(frozen=True)
class Product:
    """y = x W + b with W (inputs, outputs), read when called.

    `name` is the module's in the checkpoint, several joined by "+". `dtype` is that of x and y.
    `length_only` says that of every row of y only the length is used: other errors cost nothing.
    """

    name: str
    inputs: int
    outputs: int
    dtype: ir.DataType
    weight: Callable[[], np.ndarray]
    bias: Callable[[], np.ndarray]
    length_only: bool = False


class ProductFormat(Protocol):
    """How products are stored and multiplied; called once for each, in graph order."""

    def emit(self, b: GraphBuilder, x: ir.Value, product: Product) -> ir.Value:
        """y, (..., outputs), from x, (..., inputs)."""
        ...


class DenseProducts:
    """Weights of the activations' type."""

    def emit(self, b: GraphBuilder, x: ir.Value, product: Product) -> ir.Value:
        """MatMul and Add."""
        shape = product.inputs, product.outputs
        weight = b.weight(f"{product.name}.weight_t", shape, product.dtype, product.weight)
        return b.op("Add", b.op("MatMul", x, weight), bias_of(b, product))


def bias_of(b: GraphBuilder, product: Product) -> ir.Value:
    """The bias as a weight of the graph."""
    return b.weight(f"{product.name}.bias", (product.outputs,), product.dtype, product.bias)
