"""Linear layers of the language graph: where their tensors come from, and how a weight format writes them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir
import torch

from uhd_export.checkpoint.reader import Checkpoint
from uhd_export.plugins.graph import GraphBuilder
from uhd_export.runtime.errors import UhdError

TensorReader = Callable[[str], torch.Tensor | np.ndarray]
TORCH_DTYPES = {ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16}


class TensorSource:
    """Reads named tensors one at a time, from a checkpoint or from any function of the name."""

    def __init__(self, tensors: Checkpoint | TensorReader) -> None:
        self._read = tensors.tensor if isinstance(tensors, Checkpoint) else tensors

    def load(
        self, name: str, shape: tuple[int, ...], dtype: ir.DataType, *, transpose: bool = False
    ) -> np.ndarray:
        """Tensor `name` of `shape` as a contiguous array of `dtype`, transposed where asked.

        Raises UhdError where the shape differs or the values do not fit `dtype`.
        """
        tensor = torch.as_tensor(self._read(name)).detach()
        if tuple(tensor.shape) != shape:
            raise UhdError(
                f"tensor {name}: shape {list(tensor.shape)} differs from the expected {list(shape)}; "
                "do config.json and the weights belong together?"
            )
        tensor = tensor.to(TORCH_DTYPES[dtype])
        # A NaN is both least and greatest; and unlike isfinite, aminmax makes no second array.
        if not all(torch.isfinite(bound) for bound in torch.aminmax(tensor)):
            raise UhdError(
                f"tensor {name}: holds values that {dtype.name.lower()} cannot represent; "
                "download it again, or export in float32"
            )
        return (tensor.t() if transpose else tensor).contiguous().numpy()


@dataclass(frozen=True)
class Linear:
    """One linear layer, y = x W^T, as a weight format sees it. The bias is added by the emitter.

    `name` is its official module name, such as "model.layers.0.mlp.up_proj" or "lm_head"; `tensor` the
    name of its weight in the checkpoint, `(outputs, inputs)`: "NAME.weight", except that a tied head's
    is "model.embed_tokens.weight". `dtype` is that of x and y.
    """

    name: str
    tensor: str
    inputs: int
    outputs: int
    dtype: ir.DataType
    source: TensorSource


class LinearFormat(Protocol):
    """How the weights of linear layers are stored and multiplied.

    `emit` is called once for the linear layers that read the same x, in graph order, while the graph is
    described: it adds nodes and declares weights on `builder`, and returns their y side by side, (..., sum
    of outputs) of the layers' dtype, from x, (..., inputs). One product for all is what a GPU wants; where
    a format can't join them, `apart` multiplies one by one. It must not read tensors at once: pass a function
    to `builder.weight`, which calls it while the file is written, so that one tensor of the graph at a time
    is in memory. Weights are named after `joint_name` ("NAME.weight", "NAME.scales"), nodes too ("NAME"), so
    that profiles find their layer. A format may delegate some names, such as "lm_head", to `Dense()`.

    The same format object may be used for one dialect only where its operators exist in one only.
    """

    def emit(self, builder: GraphBuilder, x: ir.Value, *linears: Linear) -> ir.Value:
        """The product of x with the layers' weights."""
        ...


def joint_name(linears: Sequence[Linear]) -> str:
    """The name of layers that are one product: "model.layers.0.self_attn.q_proj+k_proj+v_proj"."""
    return "+".join([linears[0].name, *(linear.name.rpartition(".")[2] for linear in linears[1:])])


def outputs_of(linears: Sequence[Linear]) -> int:
    """Outputs of all layers together."""
    return sum(linear.outputs for linear in linears)


def apart(form: LinearFormat, builder: GraphBuilder, x: ir.Value, linears: Sequence[Linear]) -> ir.Value:
    """The layers' products one by one, laid side by side."""
    return builder.op("Concat", *(form.emit(builder, x, linear) for linear in linears), axis=-1)


class Dense:
    """Plain weights of the activations' type, stored transposed, (inputs, outputs), for MatMul."""

    def emit(self, builder: GraphBuilder, x: ir.Value, *linears: Linear) -> ir.Value:
        """One MatMul."""
        name, shape, dtype = joint_name(linears), (linears[0].inputs, outputs_of(linears)), linears[0].dtype

        def load() -> np.ndarray:
            if len(linears) == 1:
                return _transposed(linears[0])
            out, column = np.empty(shape, dtype.numpy()), 0
            for linear in linears:
                out[:, column : column + linear.outputs] = _transposed(linear)
                column += linear.outputs
            return out

        return builder.op("MatMul", x, builder.weight(f"{name}.weight", shape, dtype, load), name=name)


def _transposed(linear: Linear) -> np.ndarray:
    """The layer's weight as (inputs, outputs)."""
    shape = linear.outputs, linear.inputs
    return linear.source.load(linear.tensor, shape, linear.dtype, transpose=True)
