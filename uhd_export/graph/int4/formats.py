"""Weight formats of the language graph (see `uhd_export.graph.linear.LinearFormat`) for quantized layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir

from uhd_export.checkpoint.int4.gptq import GptqCheckpoint
from uhd_export.checkpoint.int4.weight import QuantizedWeight, check_group, round_to_nearest
from uhd_export.graph.int4.pack import int4_dequantize, matmul_nbits
from uhd_export.graph.linear import Dense, Linear, LinearFormat
from uhd_export.plugins.graph import CONTRIB_DOMAIN, GraphBuilder
from uhd_export.runtime.errors import UhdError

# The largest group for which ONNX Runtime's CPU kernels and TensorRT have fast paths.
MAX_GROUP = 128


@dataclass(frozen=True)
class Description:
    """What a graph must know of a quantized layer before its tensors are read."""

    bits: int
    group: int
    symmetric: bool
    order: np.ndarray | None


class WeightSource(Protocol):
    """Where quantized weights come from: `describe` while the graph is built, `load` while it is written."""

    def describe(self, linear: Linear) -> Description | None:
        """How `linear` is quantized, or None where it is not."""
        ...

    def load(self, linear: Linear) -> QuantizedWeight:
        """Its weight, in groups as described."""
        ...


class GptqWeights:
    """The layers of a GPTQ checkpoint, bit for bit."""

    def __init__(self, checkpoint: GptqCheckpoint) -> None:
        self.checkpoint = checkpoint

    def describe(self, linear: Linear) -> Description | None:
        """Reads the zero points and group indices, which are small."""
        if not self.checkpoint.is_quantized(linear.name):
            return None
        expected, actual = (linear.outputs, linear.inputs), self.checkpoint.shape(f"{linear.name}.weight")
        if actual != expected:
            raise UhdError(
                f"layer {linear.name}: qweight holds a weight of shape {list(actual)}, expected "
                f"{list(expected)}; do config.json and the weights belong together?"
            )
        checkpoint, name = self.checkpoint, linear.name
        group = _split(name, checkpoint.group(name))
        return Description(checkpoint.bits(name), group, checkpoint.symmetric(name), checkpoint.order(name))

    def load(self, linear: Linear) -> QuantizedWeight:
        """One layer, from the checkpoint."""
        weight = self.checkpoint.quantized(linear.name)
        group = _split(linear.name, weight.group)
        return weight if group == weight.group else weight.regroup(group)


def _split(name: str, group: int) -> int:
    """The group size to write for groups of `group`: the same, or the largest supported that divides it."""
    size = next((s for s in (MAX_GROUP, 64, 32, 16) if group % s == 0), None)
    if size is None:
        raise UhdError(f"layer {name}: group size {group} is not supported; it must be a multiple of 16")
    return size


class RoundedWeights:
    """Plain weights rounded to the nearest, as they are read."""

    def __init__(self, group: int, *, bits: int = 4, symmetric: bool = True) -> None:
        self.group, self.bits, self.symmetric = group, bits, symmetric
        self._recent: tuple[tuple, QuantizedWeight] | None = None

    def describe(self, linear: Linear) -> Description:
        """The same for every layer. Raises UhdError where the group does not divide its inputs."""
        check_group(linear.name, linear.inputs, self.group)
        return Description(self.bits, self.group, self.symmetric, None)

    def load(self, linear: Linear) -> QuantizedWeight:
        """Read and round one layer; its parts are asked for one after another, so the last is kept."""
        key = (linear.name, linear.tensor, id(linear.source))
        if self._recent is None or self._recent[0] != key:
            self._recent = None
            dense = linear.source.load(linear.tensor, (linear.outputs, linear.inputs), ir.DataType.FLOAT)
            weight = round_to_nearest(dense, self.group, bits=self.bits, symmetric=self.symmetric)
            self._recent = (key, weight)
        return self._recent[1]


class MatMulNBits:
    """ONNX Runtime's MatMulNBits; layers that `weights` does not quantize are left to `Dense`.

    `accuracy_level` 1 multiplies in float32, 4 (the fast default) rounds activations to int8 blocks.
    """

    def __init__(self, weights: WeightSource, *, accuracy_level: int = 4) -> None:
        self.weights, self.accuracy_level = weights, accuracy_level

    def emit(self, builder: GraphBuilder, x: ir.Value, linear: Linear) -> ir.Value:
        """One MatMulNBits, after a Gather of the inputs where the layer has an act-order."""
        about = self.weights.describe(linear)
        if about is None:
            return Dense().emit(builder, x, linear)
        groups = linear.inputs // about.group

        def part(name: str, shape: tuple[int, ...], dtype: ir.DataType) -> ir.Value:
            return builder.weight(
                f"{linear.name}.{name}", shape, dtype, lambda: matmul_nbits(self.weights.load(linear))[name]
            )

        blob, uint8 = about.group * about.bits // 8, ir.DataType.UINT8
        inputs = [
            part("B", (linear.outputs, groups, blob), uint8),
            part("scales", (linear.outputs, groups), linear.dtype),
        ]
        if not about.symmetric:
            inputs.append(part("zero_points", (linear.outputs, (groups * about.bits + 7) // 8), uint8))
        return builder.op(
            "MatMulNBits",
            _ordered(builder, x, about.order),
            *inputs,
            domain=CONTRIB_DOMAIN,
            K=linear.inputs,
            N=linear.outputs,
            bits=about.bits,
            block_size=about.group,
            accuracy_level=self.accuracy_level,
            name=linear.name,
        )


class Int4Dequantize:
    """INT4 DequantizeLinear and MatMul for TensorRT; others are left to `Dense`. Symmetric weights only."""

    def __init__(self, weights: WeightSource) -> None:
        self.weights = weights

    def emit(self, builder: GraphBuilder, x: ir.Value, linear: Linear) -> ir.Value:
        """DequantizeLinear over blocks of the (K, N) weight, then MatMul. Raises UhdError."""
        about = self.weights.describe(linear)
        if about is None:
            return Dense().emit(builder, x, linear)
        if about.bits != 4 or not about.symmetric:
            raise UhdError(
                f"layer {linear.name}: TensorRT multiplies symmetric 4-bit weights only; "
                "quantize the checkpoint with sym=True"
            )

        def part(key: str, name: str, shape: tuple[int, ...], dtype: ir.DataType) -> ir.Value:
            return builder.weight(
                f"{linear.name}.{name}",
                shape,
                dtype,
                lambda: int4_dequantize(self.weights.load(linear), linear.name)[key],
            )

        k, n = linear.inputs, linear.outputs
        weight = builder.op(
            "DequantizeLinear",
            part("x", "weight", (k, n), ir.DataType.INT4),
            part("scale", "scales", (k // about.group, n), linear.dtype),
            axis=0,
            block_size=about.group,
            name=f"{linear.name}.dequantize",
        )
        return builder.op("MatMul", _ordered(builder, x, about.order), weight, name=linear.name)


def _ordered(builder: GraphBuilder, x: ir.Value, order: np.ndarray | None) -> ir.Value:
    """The inputs in the order of the groups."""
    return x if order is None else builder.op("Gather", x, builder.constant(order.astype(np.int64)), axis=-1)


class ByName:
    """One format for all layers but those named, such as lm_head."""

    def __init__(self, default: LinearFormat, named: Mapping[str, LinearFormat]) -> None:
        self.default, self.named = default, dict(named)

    def emit(self, builder: GraphBuilder, x: ir.Value, linear: Linear) -> ir.Value:
        """What the format in charge of `linear` emits."""
        return self.named.get(linear.name, self.default).emit(builder, x, linear)
