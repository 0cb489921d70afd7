"""The predictions beside the GPU benchmark: counted, and marked as such."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def predictions():
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "gpu_model.py"], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_each_device_has_every_stage_and_says_that_nothing_was_measured(predictions):
    assert {p["device"] for p in predictions} == {"RTX 4090", "H100", "Jetson AGX Orin"}
    for prediction in predictions:
        assert prediction["what"] == "predicted from counts, not measured"
        assert set(prediction["milliseconds"]) == {"vit", "jbu", "projector", "prefill", "decode"}
        kernels = prediction["window_attention"]
        assert set(kernels) == {"window_pool", "window_scores", "window_softmax", "window_values"}
        assert 0 < sum(kernels.values()) < prediction["milliseconds"]["projector"]


def test_decoding_is_weights_and_cache_over_the_bandwidth(predictions):
    """Vicuna-7B in int4 with a dense head: 3.6 GB, and all 4096 positions: 2.15 GB, at 0.8 of 1 TB/s.

    Slices of the cache beyond 1024 positions cost more than the whole.
    """
    (ada,) = (p["milliseconds"] for p in predictions if p["device"] == "RTX 4090")
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008) * (0.5 + 2 / 128)
    bytes_moved = linear + 2 * 32000 * 4096 + 2 * 2 * 32 * 4096 * 4096
    assert ada["decode"] == pytest.approx(1e3 * bytes_moved / 0.8e12, abs=0.01)
