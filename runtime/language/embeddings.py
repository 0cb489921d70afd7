"""The language model's input embeddings: rows of a table on disk, read as they are needed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uhd_export.runtime.errors import UhdError


class EmbeddingTable:
    """A memory-mapped (vocab, D) `.npy` file."""

    def __init__(self, path: str | Path) -> None:
        try:
            # numpy's header only: allow_pickle stays off, so nothing in the file is ever executed.
            self._rows = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError, SyntaxError, OverflowError) as error:
            raise UhdError(f"embeddings {path}: cannot be read ({error}); build the bundle again") from None
        if self._rows.ndim != 2 or self._rows.dtype not in (np.float32, np.float16):
            raise UhdError(
                f"embeddings {path}: expected two axes of float32 or float16, found {self._rows.dtype} of "
                f"shape {list(self._rows.shape)}; build the bundle again"
            )

    @property
    def vocab(self) -> int:
        """Number of rows."""
        return int(self._rows.shape[0])

    @property
    def hidden(self) -> int:
        """Length of a row."""
        return int(self._rows.shape[1])

    @property
    def nbytes(self) -> int:
        """Size of the table in bytes."""
        return int(self._rows.nbytes)

    def rows(self, ids: NDArray[Any] | Sequence[int]) -> NDArray[Any]:
        """float32 (S, D) embeddings of token `ids`; UhdError where one is outside the vocabulary."""
        ids = np.asarray(ids, np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab):
            bad = int(ids[(ids < 0) | (ids >= self.vocab)][0])
            raise UhdError(f"prompt: token id {bad} is outside the vocabulary of {self.vocab}")
        rows: NDArray[Any] = self._rows[ids]
        return rows.astype(np.float32)
