"""A weight matrix in groups of small integers: what it means, and rounding to the nearest."""

from dataclasses import dataclass, replace

import numpy as np

from uhd_export.runtime.choices import GROUP_SIZES
from uhd_export.runtime.errors import UhdError


@dataclass(frozen=True)
class QuantizedWeight:
    """The (N, K) weight of a linear layer, y = x W^T, as integers with one scale and zero point a group.

    `codes` (N, K) uint8 below 2**bits; `scales` (N, G) float32, exactly as stored; `zeros` (N, G) uint8.
    A group is K / G neighbouring columns of `codes`. Where `order` (K,) is set (GPTQ's act-order), column
    j of `codes` belongs to input `order[j]` of the layer, else to input j.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    bits: int = 4
    order: np.ndarray | None = None

    @property
    def group(self) -> int:
        """Columns in a group."""
        return self.codes.shape[1] // self.scales.shape[1]

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is the middle of the range."""
        return bool((self.zeros == 1 << (self.bits - 1)).all())

    def dequantize(self) -> np.ndarray:
        """The (N, K) float32 weight, scale * (code - zero point), columns in the layer's own order.

        Exact for scales of float16: the product of 11 and at most 9 bits fits float32.
        """
        n, groups = self.scales.shape
        codes = self.codes.reshape(n, groups, -1).astype(np.float32)
        codes -= self.zeros[:, :, None]
        codes *= self.scales[:, :, None]
        out = codes.reshape(self.codes.shape)
        if self.order is None:
            return out
        ordered = np.empty_like(out)
        ordered[:, self.order] = out
        return ordered

    def rows(self, count: int) -> "QuantizedWeight":
        """The first `count` outputs."""
        return replace(self, codes=self.codes[:count], scales=self.scales[:count], zeros=self.zeros[:count])

    def regroup(self, size: int) -> "QuantizedWeight":
        """The same values in smaller groups of `size` columns, for backends that limit the group size."""
        repeat = self.group // size
        if repeat * size != self.group:
            raise ValueError(f"groups of {self.group} cannot be split into groups of {size}")
        scales, zeros = (np.repeat(a, repeat, axis=1) for a in (self.scales, self.zeros))
        return QuantizedWeight(self.codes, scales, zeros, self.bits, self.order)


def check_group(name: str, inputs: int, group: int) -> None:
    """Raise UhdError where `group` is not supported or does not divide the layer's inputs."""
    if group not in GROUP_SIZES:
        raise UhdError(f"group size {group}: must be one of {', '.join(map(str, GROUP_SIZES))}")
    if inputs % group:
        fits = [str(size) for size in GROUP_SIZES if inputs % size == 0]
        remedy = f"use {' or '.join(fits)}" if fits else "no supported size does"
        raise UhdError(f"group size {group}: does not divide the {inputs} inputs of {name}; {remedy}")


def round_to_nearest(
    weight: np.ndarray, group: int, *, bits: int = 4, symmetric: bool = True
) -> QuantizedWeight:
    """Quantize an (N, K) weight without calibration: the range of each group, evenly divided.

    Symmetric: scale = 2 max|w| / (2**bits - 1) and the zero point in the middle; else scale =
    (max - min) / (2**bits - 1) over a range that includes 0. The same grid as GPTQ's (arXiv 2210.17323,
    section 4). Scales are rounded to float16 before codes are chosen, as they will be stored.
    """
    n, k = weight.shape
    top, middle = (1 << bits) - 1, 1 << (bits - 1)
    blocks = np.asarray(weight, np.float32).reshape(n, k // group, group)
    low, high = np.minimum(blocks.min(2), 0), np.maximum(blocks.max(2), 0)
    if symmetric:
        high = np.maximum(-low, high)
        low = -high
    span = np.where(high > low, high - low, 2)
    # A subnormal scale would lose its precision, and codes below it are zero in float16 anyway.
    with np.errstate(over="ignore"):
        scales = np.maximum(span / top, np.finfo(np.float16).tiny).astype(np.float16).astype(np.float32)
    if not np.isfinite(scales).all():
        raise UhdError("weight: holds values that float16 scales cannot represent; is the checkpoint broken?")
    zeros = np.full_like(scales, middle) if symmetric else np.clip(np.rint(-low / scales), 0, top)
    codes = np.clip(np.rint(blocks / scales[:, :, None]) + zeros[:, :, None], 0, top)
    return QuantizedWeight(codes.astype(np.uint8).reshape(n, k), scales, zeros.astype(np.uint8), bits)
