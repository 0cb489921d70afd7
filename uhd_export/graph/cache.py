"""How keys and values are kept between runs: in floating point, or in 8 bits with a scale a channel."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from uhd_export.runtime.config import LanguageConfig
from uhd_export.runtime.errors import UhdError

_FLOATS = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}
# Signed and symmetric: the operators take no zero points.
_MOST = 127
# So that its inverse is a number in float16; what is lost is less than the rounding of others.
_LEAST_SCALE = 2.0**-15


@dataclass(frozen=True)
class FloatCache:
    """Keys and values as they are, in `dtype`: float32 or float16.

    `accumulation` is the type in which the tensorrt dialect's attention adds up its products with them; ONNX
    Runtime's kernels do so in float32.
    """

    dtype: str
    accumulation: str = "float32"

    @property
    def type(self) -> ir.DataType:
        """The element's. Raises UhdError where it is none."""
        if self.dtype not in _FLOATS:
            raise UhdError(f"cache: {self.dtype!r} is not supported; use one of {', '.join(_FLOATS)}")
        return _FLOATS[self.dtype]


@dataclass(frozen=True)
class LayerScales:
    """What one step of the integers stands for in a layer: float32 (kv_heads, head_size) each."""

    key: np.ndarray
    value: np.ndarray


@dataclass(frozen=True)
class Int8Cache:
    """Keys, after rotation, and values as signed integers of 8 bits, `scales` by layer."""

    scales: Sequence[LayerScales]

    @property
    def type(self) -> ir.DataType:
        """The element's."""
        return ir.DataType.INT8

    def check(self, config: LanguageConfig) -> None:
        """Raise ValueError where there is not a scale, above zero, for each channel."""
        shape = config.kv_heads, config.head_size
        arrays = [array for layer in self.scales for array in (layer.key, layer.value)]
        if len(self.scales) != config.layers or any(array.shape != shape for array in arrays):
            raise ValueError(f"scales must be {config.layers} pairs of shape {shape}")
        if not all(np.isfinite(array).all() and (array > 0).all() for array in arrays):
            raise ValueError("scales must be finite and above zero")


CacheFormat = FloatCache | Int8Cache


def scales_for(largest: np.ndarray) -> np.ndarray:
    """Scales at which magnitudes up to `largest` fit."""
    return np.maximum(largest / _MOST, _LEAST_SCALE).astype(np.float32)


def rounded(array: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """`array` as the integers hold it, in float32."""
    return np.clip(np.rint(array / scales), -_MOST - 1, _MOST) * scales
