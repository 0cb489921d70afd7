"""Rounding weights and activations to 8 bits, and the error that this causes."""

import numpy as np
from numpy.typing import DTypeLike

# Symmetric weights; activations have a zero point of their own, as DynamicQuantizeLinear gives them.
WEIGHT_LEVELS, ACTIVATION_LEVELS = 127, 255
_TINY = np.finfo(np.float32).tiny


def round_weight(weight: np.ndarray, dtype: DTypeLike = np.float32) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes (inputs, outputs) and `dtype` scales (outputs,) of a float32 matrix, a scale a column."""
    least = np.finfo(dtype).smallest_subnormal if dtype == np.float16 else _TINY  # TensorRT refuses 0
    scales = np.maximum(np.abs(weight).max(0) / WEIGHT_LEVELS, least).astype(dtype)
    codes = np.rint(weight / scales.astype(np.float32)).clip(-WEIGHT_LEVELS, WEIGHT_LEVELS)
    return codes.astype(np.int8), scales


def round_activations(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """x as uint8 codes of the range `low` to `high`, and zero, would give it back (DynamicQuantizeLinear)."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / ACTIVATION_LEVELS, float(_TINY))
    zero = np.rint(-low / scale)
    codes = np.clip(np.rint(x / scale) + zero, 0, ACTIVATION_LEVELS)
    return ((codes - zero) * scale).astype(np.float32)


def rounded_product(x: np.ndarray, low: np.ndarray, high: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """q(x) q(W) of rows x; `low` and `high` are the inputs' extremes over all rows."""
    codes, scales = round_weight(weight)
    return (round_activations(x, float(low.min()), float(high.max())) @ codes.astype(np.float32)) * scales


def relative_error(actual: np.ndarray, exact: np.ndarray) -> float:
    """|actual - exact| / |exact|."""
    return float(np.linalg.norm(actual - exact) / max(np.linalg.norm(exact), _TINY))


def lengths(rows: np.ndarray) -> np.ndarray:
    """The Euclidean length of every row."""
    return np.linalg.norm(rows, axis=-1)
