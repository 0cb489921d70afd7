"""Weight formats of the language graph (see `uhd_export.graph.linear.LinearFormat`) for quantized layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir

from uhd_export.checkpoint.int4.gptq import GptqCheckpoint
from uhd_export.checkpoint.int4.weight import QuantizedWeight, check_group, round_to_nearest
from uhd_export.graph.int4.pack import int4_dequantize, matmul_nbits
from uhd_export.graph.linear import Dense, Linear, LinearFormat, apart, joint_name, outputs_of
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


# Layers that are one product at most: as many are kept while their tensors are asked for.
_JOINT = 3


class RoundedWeights:
    """Plain weights rounded to the nearest, as they are read."""

    def __init__(self, group: int, *, bits: int = 4, symmetric: bool = True) -> None:
        self.group, self.bits, self.symmetric = group, bits, symmetric
        self._recent: dict[tuple, QuantizedWeight] = {}

    def describe(self, linear: Linear) -> Description:
        """The same for every layer. Raises UhdError where the group does not divide its inputs."""
        check_group(linear.name, linear.inputs, self.group)
        return Description(self.bits, self.group, self.symmetric, None)

    def load(self, linear: Linear) -> QuantizedWeight:
        """Read and round one layer; parts are asked for one after another, so the last layers are kept."""
        key = (linear.name, linear.tensor, id(linear.source))
        if key not in self._recent:
            if len(self._recent) == _JOINT:
                del self._recent[next(iter(self._recent))]
            dense = linear.source.load(linear.tensor, (linear.outputs, linear.inputs), ir.DataType.FLOAT)
            weight = round_to_nearest(dense, self.group, bits=self.bits, symmetric=self.symmetric)
            self._recent[key] = weight
        return self._recent[key]


def _describe_jointly(weights: WeightSource, linears: Sequence[Linear]) -> list[Description] | None:
    """How all `linears` are quantized where one product can serve them, else None."""
    found = [weights.describe(linear) for linear in linears]
    known = [about for about in found if about is not None]
    if len(known) < len(found):
        return None
    first = known[0]
    alike = all(
        (about.bits, about.group) == (first.bits, first.group) and _same_order(about.order, first.order)
        for about in known
    )
    return known if alike else None


def _same_order(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    if one is None or other is None:
        return one is other
    return np.array_equal(one, other)


def _load_jointly(weights: WeightSource, linears: Sequence[Linear]) -> QuantizedWeight:
    """The layers' weights as the rows of one."""
    loaded = [weights.load(linear) for linear in linears]
    if len(loaded) == 1:
        return loaded[0]
    codes, scales, zeros = (
        np.concatenate([getattr(weight, part) for weight in loaded]) for part in ("codes", "scales", "zeros")
    )
    return QuantizedWeight(codes, scales, zeros, loaded[0].bits, loaded[0].order)


class MatMulNBits:
    """ONNX Runtime's MatMulNBits; layers that `weights` does not quantize are left to `Dense`.

    `accuracy_level` 1 multiplies in float32, 4 (the fast default) rounds activations to int8 blocks.
    """

    def __init__(self, weights: WeightSource, *, accuracy_level: int = 4) -> None:
        self.weights, self.accuracy_level = weights, accuracy_level

    def emit(self, builder: GraphBuilder, x: ir.Value, *linears: Linear) -> ir.Value:
        """One MatMulNBits, after a Gather of the inputs where the layers have an act-order."""
        found = _describe_jointly(self.weights, linears)
        if found is None:
            return _one_by_one(self, self.weights, builder, x, linears)
        joint, outputs, about = joint_name(linears), outputs_of(linears), found[0]
        inputs, dtype = linears[0].inputs, linears[0].dtype
        groups = inputs // about.group

        def part(name: str, shape: tuple[int, ...], dtype: ir.DataType) -> ir.Value:
            def load() -> np.ndarray:
                return matmul_nbits(_load_jointly(self.weights, linears))[name]

            return builder.weight(f"{joint}.{name}", shape, dtype, load)

        blob, uint8 = about.group * about.bits // 8, ir.DataType.UINT8
        tensors = [part("B", (outputs, groups, blob), uint8), part("scales", (outputs, groups), dtype)]
        if not all(about.symmetric for about in found):
            tensors.append(part("zero_points", (outputs, (groups * about.bits + 7) // 8), uint8))
        return builder.op(
            "MatMulNBits",
            _ordered(builder, x, about.order),
            *tensors,
            domain=CONTRIB_DOMAIN,
            K=inputs,
            N=outputs,
            bits=about.bits,
            block_size=about.group,
            accuracy_level=self.accuracy_level,
            name=joint,
        )


class Int4Dequantize:
    """INT4 DequantizeLinear and MatMul for TensorRT; others are left to `Dense`. Symmetric weights only."""

    def __init__(self, weights: WeightSource) -> None:
        self.weights = weights

    def emit(self, builder: GraphBuilder, x: ir.Value, *linears: Linear) -> ir.Value:
        """DequantizeLinear over blocks of the (K, N) weight, then MatMul. Raises UhdError."""
        found = _describe_jointly(self.weights, linears)
        if found is None:
            return _one_by_one(self, self.weights, builder, x, linears)
        for linear, about in zip(linears, found, strict=True):
            if about.bits != 4 or not about.symmetric:
                raise UhdError(
                    f"layer {linear.name}: TensorRT multiplies symmetric 4-bit weights only; "
                    "quantize the checkpoint with sym=True"
                )
        joint, about = joint_name(linears), found[0]

        def part(key: str, name: str, shape: tuple[int, ...], dtype: ir.DataType) -> ir.Value:
            def load() -> np.ndarray:
                return int4_dequantize(_load_jointly(self.weights, linears), joint)[key]

            return builder.weight(f"{joint}.{name}", shape, dtype, load)

        k, n = linears[0].inputs, outputs_of(linears)
        weight = builder.op(
            "DequantizeLinear",
            part("x", "weight", (k, n), ir.DataType.INT4),
            part("scale", "scales", (k // about.group, n), linears[0].dtype),
            axis=0,
            block_size=about.group,
            name=f"{joint}.dequantize",
        )
        return builder.op("MatMul", _ordered(builder, x, about.order), weight, name=joint)


def _one_by_one(
    form: LinearFormat, weights: WeightSource, builder: GraphBuilder, x: ir.Value, linears: Sequence[Linear]
) -> ir.Value:
    """Layers that are quantized each in its own way, or not at all."""
    if all(weights.describe(linear) is None for linear in linears):
        return Dense().emit(builder, x, *linears)
    return apart(form, builder, x, linears)


def _ordered(builder: GraphBuilder, x: ir.Value, order: np.ndarray | None) -> ir.Value:
    """The inputs in the order of the groups."""
    return x if order is None else builder.op("Gather", x, builder.constant(order.astype(np.int64)), axis=-1)


class ByName:
    """One format for all layers but those named, such as lm_head."""

    def __init__(self, default: LinearFormat, named: Mapping[str, LinearFormat]) -> None:
        self.default, self.named = default, dict(named)

    def emit(self, builder: GraphBuilder, x: ir.Value, *linears: Linear) -> ir.Value:
        """What the format in charge of the layers emits; one by one where it is not the same."""
        forms = [self.named.get(linear.name, self.default) for linear in linears]
        if any(form is not forms[0] for form in forms):
            return apart(self, builder, x, linears)
        return forms[0].emit(builder, x, *linears)
