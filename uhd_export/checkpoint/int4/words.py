"""GPTQ's tensors: eight 4-bit values a 32-bit word, and the two conventions for zero points.

Of a layer with K inputs, N outputs and G groups: `qweight` (K/8, N) int32 packs codes along K, `qzeros`
(G, N/8) int32 packs zero points along N, `scales` (G, N) float16, `g_idx` (K,) int32 names each input's
group. Format "gptq" (version 1) stores zero points less one, with the borrow carried through the whole
word; "gptq_v2" stores them as they are.
"""

import numpy as np

from uhd_export.checkpoint.int4.weight import QuantizedWeight
from uhd_export.runtime.errors import UhdError

FORMATS = ("gptq", "gptq_v2")
_ONES = np.uint32(0x11111111)


def unpack_words(words: np.ndarray) -> np.ndarray:
    """(R, C) int32 to (R, C, 8) uint8: the eight 4-bit values of each word, lowest bits first."""
    octets = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8).reshape(*words.shape, 4)
    return np.stack([octets & 15, octets >> 4], -1).reshape(*words.shape, 8)


def pack_words(values: np.ndarray) -> np.ndarray:
    """(R, C, 8) uint8 below 16 to (R, C) int32, lowest bits first."""
    pairs = values.reshape(*values.shape[:2], 4, 2)
    octets = np.ascontiguousarray(pairs[..., 0] | pairs[..., 1] << 4)
    return octets.view("<i4").reshape(values.shape[:2]).astype(np.int32, copy=False)


def unpack_gptq(
    qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray, g_idx: np.ndarray | None, form: str
) -> QuantizedWeight:
    """The weight that GPTQ's tensors of format `form` hold (see the module). Raises UhdError."""
    if form not in FORMATS:
        raise UhdError(f"GPTQ format {form!r}: must be one of {', '.join(FORMATS)}")
    inputs, outputs, groups = qweight.shape[0] * 8, qweight.shape[1], scales.shape[0]
    if scales.shape != (groups, outputs) or qzeros.shape != (groups, outputs // 8) or inputs % groups:
        raise UhdError(
            f"qweight {list(qweight.shape)}, qzeros {list(qzeros.shape)} and scales {list(scales.shape)} "
            "do not belong to one 4-bit layer with equal groups"
        )
    codes = unpack_words(qweight).transpose(1, 0, 2).reshape(outputs, inputs)
    words = np.ascontiguousarray(qzeros).view(np.uint32)
    zeros = unpack_words((words + _ONES if form == "gptq" else words).view(np.int32))
    order = group_order(g_idx, inputs, groups)
    return QuantizedWeight(
        np.ascontiguousarray(codes if order is None else codes[:, order]),
        np.ascontiguousarray(scales.T, np.float32),
        np.ascontiguousarray(zeros.reshape(groups, outputs).T),
        4,
        order,
    )


def group_order(g_idx: np.ndarray | None, inputs: int, groups: int) -> np.ndarray | None:
    """The order of inputs (K,) in which each group's are neighbours, or None where they are already."""
    natural = np.arange(inputs) // (inputs // groups)
    if g_idx is None or np.array_equal(g_idx, natural):
        return None
    order = np.argsort(g_idx, kind="stable")
    if g_idx.shape != (inputs,) or not np.array_equal(g_idx[order], natural):
        raise UhdError(f"g_idx: does not divide {inputs} inputs into {groups} equal groups")
    return order


def pack_gptq(weight: QuantizedWeight, form: str = "gptq") -> dict[str, np.ndarray]:
    """`qweight`, `qzeros`, `scales` and `g_idx` of a 4-bit weight. Raises UhdError where K, N are not 8s."""
    n, k = weight.codes.shape
    groups = weight.scales.shape[1]
    if weight.bits != 4 or n % 8 or k % 8:
        raise UhdError(f"weight of shape {[n, k]}: GPTQ's 4-bit words need multiples of 8")
    g_idx = np.arange(k, dtype=np.int32) // weight.group
    codes = weight.codes
    if weight.order is not None:
        codes = np.empty_like(weight.codes)
        codes[:, weight.order] = weight.codes
        g_idx = np.empty_like(g_idx)
        g_idx[weight.order] = np.arange(k, dtype=np.int32) // weight.group
    words = pack_words(np.ascontiguousarray(weight.zeros.T).reshape(groups, n // 8, 8)).view(np.uint32)
    if form == "gptq":
        words = words - _ONES
    return {
        "qweight": pack_words(codes.reshape(n, k // 8, 8).transpose(1, 0, 2)),
        "qzeros": words.view(np.int32),
        "scales": np.ascontiguousarray(weight.scales.T, np.float16),
        "g_idx": g_idx,
    }
