"""A key-value cache of several rows: each its own sequence, all of them decoded in one run."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uhd_export.runtime.engines.base import Array, Binding, Engine, Stop
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.language.decoder import (
    EMBEDS,
    KEY_VALUE,
    LOGITS,
    LOGITS_SUM,
    PAST,
    PRESENT,
    ROWS,
    SEQUENCE_LENGTHS,
    TOKEN,
    TOTAL_LENGTH,
    VISIBLE,
    WRITE_INDEX,
    Greedy,
    visible,
)

Results = dict[str, NDArray[Any]]
_LOGITS, _GREEDY = (LOGITS,), (TOKEN, LOGITS_SUM)


class Rows:
    """`count` rows of `context` positions on a language engine; row r holds `lengths[r]` of them.

    Where the graph takes one sequence at a time, each row is a cache of its own and a step runs them one
    after the other: the answers are the same, nothing is gained by waiting for each other.
    """

    def __init__(self, engine: Engine, count: int, context: int) -> None:
        self.count, self.context = count, context
        self.lengths = [0] * count
        info = engine.inputs[EMBEDS]
        self._dtype, self.hidden = info.dtype, int(info.shape[2])
        self.vocab = int(engine.outputs[LOGITS].shape[2])
        self._positions = {SEQUENCE_LENGTHS, TOTAL_LENGTH, WRITE_INDEX, VISIBLE} & engine.inputs.keys()
        capacity = engine.inputs[PAST.format(0, KEY_VALUE[0])].shape[2]
        if isinstance(capacity, int) and context > capacity:
            raise UhdError(f"context: {context} positions, but the engine was built for {capacity}")
        self._capacity = capacity if isinstance(capacity, int) else context
        names = (re.fullmatch(re.escape(PAST).replace(r"\{\}", "(.+)"), name) for name in engine.inputs)
        shared = {match[0]: PRESENT.format(*match.groups()) for match in names if match}
        self.together = info.shape[0] == ROWS
        """Whether one run decodes several rows."""
        sizes = {"capacity": context, ROWS: count if self.together else 1}
        self._caches = [engine.bind(shared, sizes) for _ in range(1 if self.together else count)]
        self._parts: dict[tuple[int, int], Binding] = {(0, count): self._caches[0]}
        if self.together and count > 1:  # else the first request would find that a backend has no rows
            self._binding(0, 1)
        # What each row's first position is made of, see `step`.
        self._first = np.zeros((count, self.hidden), self._dtype)

    @property
    def nbytes(self) -> int:
        """Size of all rows."""
        return sum(cache.nbytes for cache in self._caches)

    def append(self, row: int, embeds: Array, stop: Stop | None = None) -> NDArray[Any]:
        """Append (S, D) embeddings to `row`; float32 logits (vocab,) of the last. Stopped changes nothing."""
        logits: NDArray[Any] = _logits(self._append(row, embeds, stop, _LOGITS))[0]
        return logits

    def append_greedy(self, row: int, embeds: Array, stop: Stop | None = None) -> Greedy:
        """As `append`, but the likeliest token is all that leaves the device."""
        return _greedy(self._append(row, embeds, stop, _GREEDY))[0]

    def step(self, rows: Sequence[int], embeds: NDArray[Any], stop: Stop | None = None) -> NDArray[Any]:
        """Append one position, of (n, D) `embeds`, to each of `rows`; float32 (n, vocab) logits.

        Rows between the first and the last of them that are not meant take part too, since the memory of a
        run is one piece. They compute their first position again, which leaves them as they are.
        """
        return _logits(self._step(rows, embeds, stop, _LOGITS))

    def step_greedy(
        self, rows: Sequence[int], embeds: NDArray[Any], stop: Stop | None = None
    ) -> list[Greedy]:
        """As `step`, but the likeliest tokens."""
        return _greedy(self._step(rows, embeds, stop, _GREEDY))

    def _append(self, row: int, embeds: Array, stop: Stop | None, outputs: tuple[str, ...]) -> Results:
        start, total = self.lengths[row], self.lengths[row] + len(embeds)
        if total > self.context:
            raise UhdError(f"context: {total} positions are needed, but a slot holds {self.context}")
        embeds = embeds.astype(self._dtype, copy=False)
        if self.together and start == 0:
            self._first[row] = embeds[0]
        results = self._run(row, row + 1, embeds[None], [total], stop, outputs)
        self.lengths[row] = total
        return results

    def _step(
        self, rows: Sequence[int], embeds: NDArray[Any], stop: Stop | None, outputs: tuple[str, ...]
    ) -> Results:
        embeds = embeds.astype(self._dtype, copy=False)
        if not self.together:
            each = [self._append(row, embeds[i : i + 1], stop, outputs) for i, row in enumerate(rows)]
            return {name: np.concatenate([results[name] for results in each]) for name in outputs}
        first, last = min(rows), max(rows) + 1
        feed, lengths = self._first[first:last, None].copy(), [1] * (last - first)
        for row, embed in zip(rows, embeds, strict=True):
            feed[row - first], lengths[row - first] = embed, self.lengths[row] + 1
        if max(lengths) > self.context:
            raise UhdError(f"context: a slot's {self.context} positions are full")
        results = self._run(first, last, feed, lengths, stop, outputs)
        for row in rows:
            self.lengths[row] += 1
        return {name: values[[row - first for row in rows]] for name, values in results.items()}

    def rewind(self, row: int, length: int) -> None:
        """Drop the positions of `row` from `length` on."""
        self.lengths[row] = min(length, self.lengths[row])

    def _run(
        self,
        first: int,
        last: int,
        embeds: NDArray[Any],
        lengths: Sequence[int],
        stop: Stop | None,
        outputs: tuple[str, ...],
    ) -> Results:
        """The `outputs` of rows `first` to `last`, which hold `lengths` positions afterwards."""
        positions = {
            SEQUENCE_LENGTHS: np.array(lengths, np.int32) - 1,
            TOTAL_LENGTH: np.array(max(lengths), np.int32),
            WRITE_INDEX: np.array(lengths, np.int64) - embeds.shape[1],
            VISIBLE: visible(max(lengths), self._capacity),
        }
        feeds = {EMBEDS: embeds} | {name: positions[name] for name in self._positions}
        return self._binding(first, last).infer(feeds, stop, outputs=outputs)

    def _binding(self, first: int, last: int) -> Binding:
        if not self.together:
            return self._caches[first]
        if (first, last) not in self._parts:
            self._parts[first, last] = self._caches[0].rows(first, last)
        return self._parts[first, last]


def _logits(results: Results) -> NDArray[Any]:
    """float32 (n, vocab)."""
    return results[LOGITS].reshape(len(results[LOGITS]), -1)


def _greedy(results: Results) -> list[Greedy]:
    """One for each row."""
    pairs = zip(results[TOKEN].ravel().tolist(), results[LOGITS_SUM].ravel().tolist(), strict=True)
    return [Greedy(*pair) for pair in pairs]
