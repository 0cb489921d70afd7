"""The smallest graph that is of use: one product of matrices, written without a library for ONNX."""

from typing import Any

import numpy as np

# ONNX's numbers of the types.
_FLOAT, _FLOAT16 = 1, 10


def product(dtype: np.dtype[Any]) -> bytes:
    """An ONNX model, c = a b of any sizes, in the format's own bytes."""
    kind = _FLOAT if dtype == np.float32 else _FLOAT16
    node = _field(1, b"a") + _field(1, b"b") + _field(2, b"c") + _field(4, b"MatMul")
    graph = _field(1, node) + _field(2, b"product")
    for number, name, dims in ((11, b"a", b"mk"), (11, b"b", b"kn"), (12, b"c", b"mn")):
        shape = b"".join(_field(1, _field(2, bytes([dim]))) for dim in dims)
        graph += _field(number, _field(1, name) + _field(2, _field(1, _field(1, kind) + _field(2, shape))))
    return _field(1, 10) + _field(7, graph) + _field(8, _field(2, 17))  # IR version 10, opset 17


def _field(number: int, value: int | bytes) -> bytes:
    """A field of a protocol buffer: a number, or bytes and how many."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])
