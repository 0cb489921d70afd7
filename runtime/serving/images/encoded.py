"""Encoded images, kept by content for all who ask about them."""

import threading
from collections import OrderedDict

from uhd_export.runtime.engines.base import Array


class EncodedImages:
    """Embeddings of images by digest, within `budget` bytes: the ones not used for longest go first."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.nbytes = 0
        self._rows: OrderedDict[str, Array] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, digest: str) -> Array | None:
        """(positions, D) embeddings of an image, or None where they are not here."""
        with self._lock:
            if digest in self._rows:
                self._rows.move_to_end(digest)
            return self._rows.get(digest)

    def put(self, digest: str, rows: Array) -> None:
        """Keep `rows`, unless they alone are over the budget."""
        with self._lock:
            if digest in self._rows or rows.nbytes > self.budget:
                return
            self._rows[digest] = rows
            self.nbytes += rows.nbytes
            while self.nbytes > self.budget:
                self.nbytes -= self._rows.popitem(last=False)[1].nbytes
