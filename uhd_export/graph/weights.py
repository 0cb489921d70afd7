"""Weights of a graph by checkpoint name: read, transposed and converted only when written."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
import torch

from uhd_export.checkpoint.reader import Checkpoint
from uhd_export.plugins.graph import GraphBuilder


class Weights:
    """Initializers of one part of the model, named as in the checkpoint under `prefix`."""

    def __init__(self, b: GraphBuilder, checkpoint: Checkpoint, prefix: str, dtype: ir.DataType) -> None:
        self.b, self.checkpoint, self.prefix, self.dtype = b, checkpoint, prefix, dtype

    def plain(self, name: str, dtype: ir.DataType | None = None) -> ir.Value:
        """The tensor as it is stored."""
        return self._add(name, self.checkpoint.shape(self.prefix + name), lambda t: t, [name], dtype)

    def linear(self, *names: str) -> ir.Value:
        """The (in, out) matrix of a Linear, or of a convolution as one; several are laid side by side."""
        shapes = [self.checkpoint.shape(f"{self.prefix}{name}.weight") for name in names]
        shape = (math.prod(shapes[0][1:]), sum(s[0] for s in shapes))
        parts = [f"{name}.weight" for name in names]
        return self._add("+".join(names) + ".weight_t", shape, lambda t: t.flatten(1).T, parts, axis=1)

    def bias(self, *names: str) -> ir.Value:
        """The bias of a Linear; several are joined."""
        parts = [f"{name}.bias" for name in names]
        size = sum(self.checkpoint.shape(self.prefix + part)[0] for part in parts)
        return self._add("+".join(names) + ".bias", (size,), lambda t: t, parts)

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

    def _add(
        self,
        name: str,
        shape: Sequence[int],
        change: Callable[[torch.Tensor], torch.Tensor],
        parts: Sequence[str],
        dtype: ir.DataType | None = None,
        axis: int = 0,
    ) -> ir.Value:
        def load() -> np.ndarray:
            tensors = [change(self.checkpoint.tensor(self.prefix + part, torch.float32)) for part in parts]
            return (tensors[0] if len(tensors) == 1 else torch.cat(tensors, axis)).numpy()

        return self.b.weight(f"{self.prefix}{name}", tuple(shape), dtype or self.dtype, load)
