"""Weights of a graph by checkpoint name: read, transposed and converted only when written."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
import torch

from uhd_export.checkpoint.reader import Checkpoint
from uhd_export.graph.products import DenseProducts, Product, ProductFormat
from uhd_export.plugins.graph import GraphBuilder


class Weights:
    """Initializers of one part of the model, named as in the checkpoint under `prefix`."""

    def __init__(
        self,
        b: GraphBuilder,
        checkpoint: Checkpoint,
        prefix: str,
        dtype: ir.DataType,
        products: ProductFormat | None = None,
    ) -> None:
        self.b, self.checkpoint, self.prefix, self.dtype = b, checkpoint, prefix, dtype
        self._products = products or DenseProducts()

    def plain(self, name: str, dtype: ir.DataType | None = None) -> ir.Value:
        """The tensor as it is stored."""
        shape = self.checkpoint.shape(self.prefix + name)
        return self.b.weight(f"{self.prefix}{name}", shape, dtype or self.dtype, lambda: self._read([name]))

    def linear(self, *names: str) -> ir.Value:
        """The (in, out) matrix of a Linear, or of a convolution as one; several are laid side by side."""
        return self.b.weight(
            f"{self.prefix}{'+'.join(names)}.weight_t",
            self._matrix_shape(names),
            self.dtype,
            self._matrix(names),
        )

    def product(self, x: ir.Value, *names: str) -> ir.Value:
        """x W + b of a Linear in the products' format; several are laid side by side."""
        biases = [f"{name}.bias" for name in names]
        product = Product(
            self.prefix + "+".join(names),
            *self._matrix_shape(names),
            self.dtype,
            self._matrix(names),
            lambda: self._read(biases),
        )
        return self._products.emit(self.b, x, product)

    def array_product(
        self, x: ir.Value, name: str, weight: torch.Tensor, bias: torch.Tensor, *, length_only: bool = False
    ) -> ir.Value:
        """x W + b with tensors computed by us, W (in, out), in the products' format."""
        inputs, outputs = weight.shape
        name = f"{self.prefix}{name}"
        product = Product(name, inputs, outputs, self.dtype, weight.numpy, bias.numpy, length_only)
        return self._products.emit(self.b, x, product)

    def bias(self, *names: str) -> ir.Value:
        """The bias of a Linear; several are joined."""
        parts = [f"{name}.bias" for name in names]
        size = sum(self.checkpoint.shape(self.prefix + part)[0] for part in parts)
        name = f"{self.prefix}{'+'.join(names)}.bias"
        return self.b.weight(name, (size,), self.dtype, lambda: self._read(parts))

    def changed(
        self, name: str, shape: Sequence[int], change: Callable[[torch.Tensor], torch.Tensor]
    ) -> ir.Value:
        """The tensor as `change` makes it, of `shape`."""

        def load() -> np.ndarray:
            return change(self.checkpoint.tensor(self.prefix + name, torch.float32)).numpy()

        return self.b.weight(f"{self.prefix}{name}_changed", tuple(shape), self.dtype, load)

    def layer_norm(self, x: ir.Value, name: str, eps: float) -> ir.Value:
        """LayerNormalization over the last axis with the affine called `name`."""
        affine = self.plain(f"{name}.weight"), self.plain(f"{name}.bias")
        return self.b.op("LayerNormalization", x, *affine, axis=-1, epsilon=eps)

    def number(self, value: float) -> ir.Value:
        """A scalar of the graph's type."""
        return self.b.constant(value, self.dtype.numpy())

    def array(self, name: str, tensor: torch.Tensor) -> ir.Value:
        """A tensor computed by us, such as a folded weight."""
        return self.b.weight(f"{self.prefix}{name}", tuple(tensor.shape), self.dtype, tensor.numpy)

    def _matrix_shape(self, names: Sequence[str]) -> tuple[int, int]:
        shapes = [self.checkpoint.shape(f"{self.prefix}{name}.weight") for name in names]
        return math.prod(shapes[0][1:]), sum(shape[0] for shape in shapes)

    def _matrix(self, names: Sequence[str]) -> Callable[[], np.ndarray]:
        parts = [f"{name}.weight" for name in names]
        return lambda: self._read(parts, lambda tensor: tensor.flatten(1).T, axis=1)

    def _read(
        self,
        parts: Sequence[str],
        change: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
        axis: int = 0,
    ) -> np.ndarray:
        tensors = [change(self.checkpoint.tensor(self.prefix + part, torch.float32)) for part in parts]
        return (tensors[0] if len(tensors) == 1 else torch.cat(tensors, axis)).numpy()
