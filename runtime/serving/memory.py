"""Memory is reserved by plan: what does not fit is refused at start, not at the thousandth request."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from uhd_export.runtime.config import ModelConfig
from uhd_export.runtime.errors import UhdError


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes, beside the weights: the slots' cache, encoded images, and crops of all requests."""

    cache: int
    encoded: int
    waiting: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.cache + self.encoded + self.waiting

    def check(self, available: int | None) -> None:
        """Raise UhdError where `available` bytes are not enough; None is not known."""
        if available is not None and self.total > available:
            raise UhdError(
                f"memory: {self.total / 1e9:.2f} GB are needed beside the weights ({self.cache / 1e9:.2f} "
                f"of them the slots' caches), {available / 1e9:.2f} GB are free; use fewer --slots, a "
                "smaller --context, or a smaller --image-cache"
            )


def plan_memory(
    model: ModelConfig, dtype: np.dtype[Any], *, slots: int, context: int, encoded: int, waiting: int
) -> MemoryPlan:
    """What `slots` of `context` positions take, keys and values in `dtype`.

    `encoded` bytes of images come to them, and `waiting` of cut ones.
    """
    language = model.language
    position = 2 * language.layers * language.kv_heads * language.head_size * np.dtype(dtype).itemsize
    return MemoryPlan(slots * context * position, encoded, waiting)
