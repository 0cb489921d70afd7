"""GPTQ's tensors: 32-bit words of 4-bit or 8-bit values, and the two conventions for zero points.

Of a layer with K inputs, N outputs and G groups, P = 32 / bits values a word: `qweight` (K/P, N) int32
packs codes along K, `qzeros` (G, N/P) int32 packs zero points along N, `scales` (G, N) float16, `g_idx` (K,)
int32 names each input's group. Format "gptq" (version 1) stores zero points less one, with the borrow carried
through the whole word; "gptq_v2" stores them as they are.
"""

from math import gcd

import numpy as np

from uhd_export.checkpoint.int4.weight import QuantizedWeight
from uhd_export.runtime.errors import UhdError

FORMATS = ("gptq", "gptq_v2")
_ONES = {4: np.uint32(0x11111111), 8: np.uint32(0x01010101)}


def middle_word(bits: int, form: str) -> int:
    """The int32 word of zero points that are all the middle of the range."""
    ones = int(_ONES[bits])
    word = ones * (1 << (bits - 1)) - (ones if form == "gptq" else 0)
    return word - (1 << 32) if word >= 1 << 31 else word


def unpack_words(words: np.ndarray, bits: int = 4) -> np.ndarray:
    """(R, C) int32 to (R, C, 32 / bits) uint8: the values of each word, lowest bits first."""
    octets = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8).reshape(*words.shape, 4)
    if bits == 8:
        return octets
    return np.stack([octets & 15, octets >> 4], -1).reshape(*words.shape, 8)


def pack_words(values: np.ndarray) -> np.ndarray:
    """(R, C, 8) uint8 below 16 to (R, C) int32, lowest bits first."""
    pairs = values.reshape(*values.shape[:2], 4, 2)
    octets = np.ascontiguousarray(pairs[..., 0] | pairs[..., 1] << 4)
    return octets.view("<i4").reshape(values.shape[:2]).astype(np.int32, copy=False)


def word_bits(qzeros: tuple[int, ...], scales: tuple[int, ...]) -> int:
    """Bits of a code, by the shapes of a layer's `qzeros` and `scales`. Raises UhdError unless 4 or 8."""
    outputs = scales[-1] if len(scales) == 2 else 0
    for bits in (4, 8):
        if (
            outputs
            and len(qzeros) == 2
            and qzeros == (scales[0], outputs * bits // 32)
            and outputs * bits % 32 == 0
        ):
            return bits
    width = 32 * qzeros[-1] / outputs if outputs and qzeros else 0
    raise UhdError(
        f"qzeros {list(qzeros)} and scales {list(scales)} are of {width:g} bits; 4 and 8 are supported: "
        "quantize it again with those"
    )


def unpack_gptq(
    qweight: np.ndarray,
    qzeros: np.ndarray,
    scales: np.ndarray,
    g_idx: np.ndarray | None,
    form: str,
    group: int | None = None,
) -> QuantizedWeight:
    """The weight that GPTQ's tensors of format `form` hold (see the module). Raises UhdError.

    `group` is the stated group size: where it does not divide the inputs, the last group is smaller, and
    the weight comes in groups that divide both. None: all groups are equal.
    """
    if form not in FORMATS:
        raise UhdError(f"GPTQ format {form!r}: must be one of {', '.join(FORMATS)}")
    bits = word_bits(qzeros.shape, scales.shape)
    if qweight.ndim != 2 or qweight.shape[1] != scales.shape[1]:
        raise UhdError(
            f"qweight {list(qweight.shape)}, qzeros {list(qzeros.shape)} and scales {list(scales.shape)} "
            "do not belong to one layer"
        )
    if not np.isfinite(scales).all():
        raise UhdError("scales: hold values that are no numbers; download it again, or quantize it again")
    inputs, outputs, groups = qweight.shape[0] * (32 // bits), qweight.shape[1], scales.shape[0]
    size = group_size(inputs, groups, group)
    codes = unpack_words(qweight, bits).transpose(1, 0, 2).reshape(outputs, inputs)
    words = np.ascontiguousarray(qzeros).view(np.uint32)
    zeros = unpack_words((words + _ONES[bits] if form == "gptq" else words).view(np.int32), bits)
    order = group_order(g_idx, inputs, groups, size)
    part = gcd(size, inputs)  # the stated groups in equal parts
    of_part = np.arange(inputs // part) * part // size
    return QuantizedWeight(
        np.ascontiguousarray(codes if order is None else codes[:, order]),
        np.ascontiguousarray(scales.T[:, of_part], np.float32),
        np.ascontiguousarray(zeros.reshape(groups, outputs).T[:, of_part]),
        bits,
        order,
    )


def group_size(inputs: int, groups: int, stated: int | None) -> int:
    """Inputs in a group: `stated` where that makes as many groups, else equal ones. Raises UhdError."""
    if stated is not None and stated > 0 and -(-inputs // stated) == groups:
        return min(stated, inputs)
    if groups < 1 or inputs % groups:
        raise UhdError(f"{groups} groups do not divide {inputs} inputs, and no group_size says how they lie")
    return inputs // groups


def group_order(
    g_idx: np.ndarray | None, inputs: int, groups: int, size: int | None = None
) -> np.ndarray | None:
    """The order of inputs (K,) in which each group's are neighbours, or None where they are already."""
    natural = np.arange(inputs) // (size or inputs // groups)
    if g_idx is None or np.array_equal(g_idx, natural):
        return None
    order = np.argsort(g_idx, kind="stable")
    if g_idx.shape != (inputs,) or not np.array_equal(g_idx[order], natural):
        raise UhdError(f"g_idx: does not divide {inputs} inputs into {groups} groups of the stated size")
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
        words = words - _ONES[4]
    return {
        "qweight": pack_words(codes.reshape(n, k // 8, 8).transpose(1, 0, 2)),
        "qzeros": words.view(np.int32),
        "scales": np.ascontiguousarray(weight.scales.T, np.float16),
        "g_idx": g_idx,
    }
