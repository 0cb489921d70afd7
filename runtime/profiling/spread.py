"""Repeated measurements as one figure: a median that says how far it can be trusted."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 2000
_PERCENT = 95
# A run this little faster than the one before it: caches, pages and clocks have settled.
_STEADY = 0.05


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements, in seconds.

    `interval` holds the median of another such series 95 times of 100, by bootstrap of these samples; None
    where they are fewer than three.
    """

    median: float
    low: float
    high: float
    interval: tuple[float, float] | None = None
    samples: tuple[float, ...] = ()

    @staticmethod
    def of(samples: Sequence[float]) -> "Spread":
        """Of `samples`; with one sample all three are equal."""
        kept = tuple(samples)
        if len(kept) == 1:
            return Spread(kept[0], kept[0], kept[0], None, kept)
        low, median, high = statistics.quantiles(kept, n=4, method="inclusive")
        return Spread(median, low, high, bootstrap(kept), kept)


def bootstrap(samples: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the median of `samples`; the same for the same samples."""
    if len(samples) < 3:
        return None
    draws = np.random.default_rng(0).choice(np.asarray(samples), (_RESAMPLES, len(samples)))
    low, high = np.percentile(np.median(draws, axis=1), [(100 - _PERCENT) / 2, (100 + _PERCENT) / 2])
    return float(low), float(high)


def percentiles(samples: Sequence[float], wanted: Sequence[int] = (50, 90, 99)) -> dict[str, float]:
    """Percentiles of `samples` by name: p50, p90 and p99."""
    found = np.percentile(np.asarray(samples), list(wanted))
    return {f"p{name}": float(value) for name, value in zip(wanted, found, strict=True)}


def is_steady(seconds: Sequence[float]) -> bool:
    """Whether the last of these warm-up runs was hardly faster than the one before."""
    return len(seconds) > 1 and seconds[-1] > seconds[-2] * (1 - _STEADY)
