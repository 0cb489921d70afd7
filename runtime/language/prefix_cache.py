"""Prefix reuse: a decoder that remembers what its cache holds, so that only new positions are run."""

from collections.abc import Callable, Hashable, Sequence

import numpy as np

from uhd_export.runtime.language.decoder import Decoder


class PrefixCache:
    """A `Decoder` with the key of every position in its cache (see `uhd_export.runtime.language.sequence`).

    A second question about an image shares the prompt up to the question, so its prefill is short.
    """

    def __init__(self, decoder: Decoder, *, chunk: int | None = None) -> None:
        self.decoder, self._chunk = decoder, chunk
        self._keys: list[Hashable] = []
        self.prefilled = 0
        """Positions that the last `prefill` ran."""

    def prefill(self, keys: Sequence[Hashable], embeds: Callable[[int], np.ndarray]) -> np.ndarray:
        """float32 logits (vocab,) after the positions `keys`, running only those not in the cache.

        `embeds(start)` gives the (S, D) embeddings from position `start` on. The last position always
        runs, because its logits are not kept.
        """
        start = min(self._common(keys), len(keys) - 1)
        new = embeds(start)
        # What is dropped is forgotten before anything runs: an interrupted run leaves a valid prefix.
        del self._keys[start:]
        self.decoder.rewind(start)
        logits = self.decoder.prefill(new, chunk=self._chunk)
        self._keys.extend(keys[start:])
        self.prefilled = len(keys) - start
        return logits

    def step(self, key: Hashable, embed: np.ndarray) -> np.ndarray:
        """Append one position; float32 logits (vocab,) of the next."""
        del self._keys[self.decoder.length :]
        logits = self.decoder.step(embed)
        self._keys.append(key)
        return logits

    def forget(self) -> None:
        """Drop everything, so that the next prefill runs in full."""
        self._keys.clear()
        self.decoder.rewind(0)

    def _common(self, keys: Sequence[Hashable]) -> int:
        """How many positions of the cache are the first of `keys`."""
        length = min(len(self._keys), len(keys), self.decoder.length)
        return next((i for i in range(length) if self._keys[i] != keys[i]), length)
