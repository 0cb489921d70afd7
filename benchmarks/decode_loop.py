"""The loop of benchmarks/decode.py: greedy over the same prompt ids for every engine.

`prefill` ends with the first token, then each step runs the model on the last token and picks the next.
"""

import time
from collections.abc import Callable
from typing import NamedTuple


class Run(NamedTuple):
    """Seconds of the prefill and of each decoding step, and the tokens."""

    prefill: float
    steps: list[float]
    tokens: list[int]


def loop(prefill: Callable[[], int], step: Callable[[int], int], steps: int) -> Run:
    """One answer of `steps` tokens after the first."""
    start = time.perf_counter()
    tokens, times = [prefill()], []
    first = time.perf_counter()
    for _ in range(steps):
        before = time.perf_counter()
        tokens.append(step(tokens[-1]))
        times.append(time.perf_counter() - before)
    return Run(first - start, times, tokens)
