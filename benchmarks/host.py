"""What the host does around the engines, timed on its own: `python benchmarks/host.py`, no bundle, no GPU.

Each line stands beside the plain way to do the same, written out here, and both give equal results.
"""

import json
import sys
import time
from collections.abc import Callable

import numpy as np

from uhd_export.runtime.image.pixels import CLIP_MEAN, CLIP_STD, normalise_batch
from uhd_export.runtime.language.sampling import probabilities
from uhd_export.runtime.profiling.machine import machine
from uhd_export.runtime.settings import Sampling

VOCABULARY = 32_000
SAMPLINGS = (Sampling(0.7, top_k=50), Sampling(0.7, top_p=0.9), Sampling(0.7, top_k=50, top_p=0.9))


def median_ms(run: Callable[[], object], repeats: int = 31) -> float:
    """Median time of `run`, after a warm-up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return round(1e3 * sorted(times)[repeats // 2], 3)


def by_arithmetic(crops: list[np.ndarray]) -> np.ndarray:
    """Pixels by CLIP's arithmetic, each value anew."""
    mean, std = np.array(CLIP_MEAN, np.float32), np.array(CLIP_STD, np.float32)
    scaled = ((crop * (1 / 255)).astype(np.float32) for crop in crops)
    return np.stack([((values - mean) / std).transpose(2, 0, 1) for values in scaled])


def by_sorting(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probabilities with the whole vocabulary in order."""
    wide = logits.astype(np.float64)
    weights = np.exp((wide - wide.max()) / sampling.temperature)
    order = np.argsort(-wide, kind="stable")[: sampling.top_k or None]
    cumulative = np.cumsum(weights[order])
    order = order[: np.searchsorted(cumulative, sampling.top_p * cumulative[-1]) + 1]
    kept = np.zeros_like(weights)
    kept[order] = weights[order]
    return kept / kept.sum()


def measure() -> dict[str, dict[str, float]]:
    """Milliseconds of the plain way and of ours."""
    random = np.random.default_rng(0)
    crops = [random.integers(0, 256, (336, 336, 3), np.uint8) for _ in range(6)]
    assert np.array_equal(by_arithmetic(crops), normalise_batch(crops))
    results = {
        "pixels of six 336x336 slices": {
            "plain": median_ms(lambda: by_arithmetic(crops)),
            "ours": median_ms(lambda: normalise_batch(crops)),
        }
    }
    logits = (3 * random.standard_normal(VOCABULARY)).astype(np.float32)
    for sampling in SAMPLINGS:
        assert np.allclose(by_sorting(logits, sampling), probabilities(logits, sampling), rtol=1e-12)
        results[f"top_k {sampling.top_k}, top_p {sampling.top_p} of {VOCABULARY}"] = {
            "plain": median_ms(lambda s=sampling: by_sorting(logits, s)),
            "ours": median_ms(lambda s=sampling: probabilities(logits, s)),
        }
    return results


if __name__ == "__main__":
    json.dump({"machine": machine("cpu", None), "milliseconds": measure()}, sys.stdout, indent=1)
    print()
