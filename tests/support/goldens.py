"""Tensors that the released code made, and how equal a result must be to them."""

import functools
import json
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 1e-4


@functools.cache
def golden_tensors(name: str) -> dict[str, np.ndarray]:
    """The arrays of `golden/NAME.safetensors`."""
    from safetensors.numpy import load_file

    return load_file(GOLDEN / f"{name}.safetensors")


@functools.cache
def golden_json(name: str) -> dict:
    """The value of `golden/NAME.json`."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def assert_close(actual, expected, tolerance: float = TOLERANCE) -> None:
    """Equal shapes, and equal values to `tolerance` absolute."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance
