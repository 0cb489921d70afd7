"""Decoding with a KV cache of fixed capacity that stays on the device and can be rewound."""

import re
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from uhd_export.runtime.engines.base import Array, Engine, Stop
from uhd_export.runtime.errors import UhdError

# Names of a language graph's inputs and outputs.
EMBEDS = "inputs_embeds"
LOGITS = "logits"
# The first of the greatest logits, and their sum, which is a finite number where all of them are.
TOKEN, LOGITS_SUM = "token", "logits_sum"
PAST = "past_key_values.{}.{}"
PRESENT = "present.{}.{}"
KEY_VALUE = ("key", "value")
# The free dimension of sequences that run together, where a graph has one.
ROWS = "rows"
# ONNX Runtime's GroupQueryAttention: index of the last position, and number of positions.
SEQUENCE_LENGTHS = "seqlens_k"
TOTAL_LENGTH = "total_sequence_length"
# TensorScatter: where in the cache the sequence goes.
WRITE_INDEX = "write_index"
# An input of any values whose length is how much of the cache attention reads (see `visible`).
VISIBLE = "visible"
_LEAST_VISIBLE = 512
# Of a processor: in longer runs of a prompt attention computes more pairs of positions that do not count.
ENOUGH_POSITIONS = 256


def visible_sizes(context: int) -> list[int]:
    """How much of a cache of `context` positions attention may be told to read: 512, 1024, ... and all.

    An engine has kernels for these sizes alone, and a CUDA graph for each that is met. A part is copied
    before it is read, all is read where it lies: parts of a third or more would move more bytes than all.
    """
    sizes: list[int] = []
    while 3 * (_LEAST_VISIBLE << len(sizes)) < context:
        sizes.append(_LEAST_VISIBLE << len(sizes))
    return [*sizes, context]


def visible(positions: int, context: int) -> NDArray[np.bool_]:
    """What to feed as `VISIBLE` where `positions` are in use: the least size that holds them."""
    return np.ones(next(size for size in visible_sizes(context) if size >= positions), np.bool_)


class Decoder:
    """One conversation on a language engine: the first `length` positions are in the cache.

    Several decoders may share an engine; each has its own cache of `context` positions. Without `context`
    the engine must have been built for a fixed one, which is then used. Raises UhdError where an engine of
    fixed capacity has less.
    """

    def __init__(self, engine: Engine, context: int | None = None) -> None:
        self._engine, self._dtype = engine, engine.inputs[EMBEDS].dtype
        self._positions = {SEQUENCE_LENGTHS, TOTAL_LENGTH, WRITE_INDEX, VISIBLE} & engine.inputs.keys()
        self.hidden = engine.inputs[EMBEDS].shape[2]
        self.vocab = engine.outputs[LOGITS].shape[2]
        self.length = 0
        capacity = engine.inputs[PAST.format(0, KEY_VALUE[0])].shape[2]
        if isinstance(capacity, int):
            context = capacity if context is None else context
            if context > capacity:
                raise UhdError(f"context: {context} positions, but the engine was built for {capacity}")
        elif context is None:
            raise UhdError("context: the engine has no fixed one; say how many positions to hold")
        self.context = context
        self._capacity = capacity if isinstance(capacity, int) else context
        pattern = re.escape(PAST).replace(r"\{\}", "(.+)")
        found = [(name, re.fullmatch(pattern, name)) for name in engine.inputs]
        shared = {name: PRESENT.format(*match.groups()) for name, match in found if match}
        self._cache = engine.bind(shared, {"capacity": context, ROWS: 1})

    @property
    def kv_bytes(self) -> int:
        """Size of the whole cache."""
        return self._cache.nbytes

    @property
    def remaining(self) -> int:
        """Positions that are still free."""
        return self.context - self.length

    def prefill(
        self, embeds: NDArray[Any], *, chunk: int | None = None, stop: Stop | None = None
    ) -> NDArray[Any]:
        """Append (S, D) or (1, S, D) embeddings; float32 logits (vocab,) of the last position.

        May be called again to append a further turn. `chunk` limits the positions a run, and with it the
        memory of activations. Raises UhdError where the positions do not fit, without changing the cache, or
        where the logits are no numbers; Stopped where `stop` ended it.
        """
        return self._append(embeds, chunk, stop, (LOGITS,))[LOGITS].reshape(-1)

    def step(self, embeds: NDArray[Any], stop: Stop | None = None) -> NDArray[Any]:
        """Append one position, (D,), (1, D) or (1, 1, D); float32 logits (vocab,) of the next."""
        return self.prefill(embeds.reshape(1, 1, -1), stop=stop)

    def greedy(self, embeds: NDArray[Any], *, chunk: int | None = None, stop: Stop | None = None) -> int:
        """As `prefill`, but the likeliest token, the first of equals, which is all that leaves the device."""
        return int(self._append(embeds, chunk, stop, (TOKEN, LOGITS_SUM))[TOKEN].item())

    def rewind(self, length: int) -> None:
        """Drop all positions from `length` on, so that another question can follow what came before."""
        if not 0 <= length <= self.length:
            raise UhdError(f"rewind to {length}: the cache holds {self.length} positions")
        self.length = length

    def _check(self, embeds: NDArray[Any]) -> NDArray[Any]:
        embeds = embeds if embeds.ndim == 3 else embeds[None]
        if embeds.shape[0] != 1 or embeds.shape[1] < 1 or embeds.shape[2] != self.hidden:
            raise ValueError(f"embeddings of shape {embeds.shape} instead of (1, S, {self.hidden})")
        needed = self.length + embeds.shape[1]
        if needed > self.context:
            raise UhdError(
                f"context: {needed} positions are needed ({self.length} cached, {embeds.shape[1]} new), "
                f"but it holds {self.context}; use a larger context, a shorter prompt or fewer slices"
            )
        return embeds.astype(self._dtype, copy=False)

    def _append(
        self, embeds: NDArray[Any], chunk: int | None, stop: Stop | None, outputs: tuple[str, ...]
    ) -> dict[str, NDArray[Any]]:
        """The `outputs` after the last of `embeds`, all finite."""
        embeds = self._check(embeds)
        count = embeds.shape[1]
        size = count if chunk is None else chunk
        if size < 1:
            raise UhdError(f"prefill chunk: {size} positions; use at least 1")
        size = -(-count // -(-count // size))  # as many runs, about equally long
        for start in range(0, count, size):
            last = start + size >= count
            results = self._run(embeds[:, start : start + size], stop, outputs if last else ())
        if count > 1:
            self._engine.trim()
        return results

    def _run(
        self, embeds: NDArray[Any], stop: Stop | None, outputs: tuple[str, ...]
    ) -> dict[str, NDArray[Any]]:
        past, total = self.length, self.length + embeds.shape[1]
        positions: dict[str, NDArray[Any]] = {
            SEQUENCE_LENGTHS: np.array([total - 1], np.int32),
            TOTAL_LENGTH: np.array(total, np.int32),
            WRITE_INDEX: np.array([past], np.int64),
        }
        if VISIBLE in self._positions:
            positions[VISIBLE] = visible(total, self._capacity)
        feeds: dict[str, Array] = {EMBEDS: embeds} | {name: positions[name] for name in self._positions}
        results = self._cache.infer(feeds, stop, outputs=outputs)
        for name in outputs:
            check_finite(results[name])
        self.length = total
        return results


class Greedy(NamedTuple):
    """What greedy decoding needs of a position's logits: `token`, and their sum, finite where they are."""

    token: int
    logits_sum: float

    def checked(self) -> int:
        """The token. Raises UhdError where the logits were no numbers."""
        check_finite(np.asarray(self.logits_sum))
        return self.token


def check_finite(logits: NDArray[Any]) -> NDArray[Any]:
    """`logits`. Raises UhdError where one is infinite or no number: no token can be chosen among them."""
    if not np.isfinite(logits).all():
        raise UhdError(
            "language engine: its logits are not finite numbers; check the bundle with `uhd-export check`, "
            "or build it with --dtype float32"
        )
    return logits
