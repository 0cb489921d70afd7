"""Seconds by stage of one answer."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

STAGES = ("image", "vision", "prefill", "decode")


class Stopwatch:
    """Adds up the time that each stage took: `image` is opening, cutting and normalising."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time of the block for stage `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start
