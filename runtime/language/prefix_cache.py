"""Prefix reuse: what each position of a decoder's cache holds, so that only new positions are run."""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from numpy.typing import NDArray

from uhd_export.runtime.engines.base import Array, Stop
from uhd_export.runtime.language.decoder import Decoder


class PrefixCache:
    """The keys of the positions in a decoder's cache (see `uhd_export.runtime.language.sequence`).

    A second question about an image shares the prompt up to the question, so its prefill is short:
    `match` says from where to run, embeddings are made from there, `prefill` runs them.
    """

    def __init__(self, decoder: Decoder, *, chunk: int | None = None) -> None:
        self._decoder = decoder
        self.chunk = chunk
        """Most positions that a run of `prefill` takes; None is all."""
        self._keys: list[Hashable] = []
        self.prefilled = 0
        """Positions that the last `prefill` ran."""

    def match(self, keys: Sequence[Hashable]) -> int:
        """The first of the positions `keys` that has to run.

        The last one always does, because its logits are not stored.
        """
        length = min(len(self._keys), len(keys) - 1, self._decoder.length)
        return next((i for i in range(length) if self._keys[i] != keys[i]), length)

    def prefill(self, keys: Sequence[Hashable], embeds: Array, stop: Stop | None = None) -> NDArray[Any]:
        """float32 logits (vocab,) after the positions `keys`, whose last (S, D) `embeds` are run.

        Those before them are in the cache, see `match`.
        """
        with self._appending(keys, len(embeds)):
            return self._decoder.prefill(embeds, chunk=self.chunk, stop=stop)

    def prefill_greedy(self, keys: Sequence[Hashable], embeds: Array, stop: Stop | None = None) -> int:
        """As `prefill`, but the likeliest token (see `Decoder.greedy`)."""
        with self._appending(keys, len(embeds)):
            return self._decoder.greedy(embeds, chunk=self.chunk, stop=stop)

    def step(self, key: Hashable, embed: NDArray[Any], stop: Stop | None = None) -> NDArray[Any]:
        """Append one position; float32 logits (vocab,) of the next."""
        with self._following(key):
            return self._decoder.step(embed, stop)

    def step_greedy(self, key: Hashable, embed: NDArray[Any], stop: Stop | None = None) -> int:
        """As `step`, but the likeliest token."""
        with self._following(key):
            return self._decoder.greedy(embed.reshape(1, -1), stop=stop)

    @contextmanager
    def _appending(self, keys: Sequence[Hashable], count: int) -> Iterator[None]:
        """The block runs the last `count` of `keys`, before which it finds the others."""
        start = len(keys) - count
        # What is dropped is forgotten before anything runs: an interrupted run leaves a valid prefix.
        del self._keys[start:]
        self._decoder.rewind(start)
        yield
        self._keys.extend(keys[start:])
        self.prefilled = count

    @contextmanager
    def _following(self, key: Hashable) -> Iterator[None]:
        """The block runs one position more."""
        del self._keys[self._decoder.length :]
        yield
        self._keys.append(key)

    def forget(self) -> None:
        """Drop everything, so that the next prefill runs in full."""
        self._keys.clear()
        self._decoder.rewind(0)
