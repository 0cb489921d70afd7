"""Continuous batching: one thread runs the language engine for all callers.

Each turn of its loop runs at most one chunk of one newcomer's prompt and one step of all running answers, so
that neither waits long for the other.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

from numpy.typing import NDArray
from tokenizers import Tokenizer

from uhd_export.runtime.engines.base import Array, Engine, Stop, Stopped
from uhd_export.runtime.language.decoder import Greedy
from uhd_export.runtime.language.embeddings import EmbeddingTable
from uhd_export.runtime.serving.cache.rows import Rows
from uhd_export.runtime.serving.cache.slots import Slots
from uhd_export.runtime.serving.images.encoded import EncodedImages
from uhd_export.runtime.serving.images.worker import VisionWorker
from uhd_export.runtime.serving.scheduling.embeddings import PromptEmbeddings
from uhd_export.runtime.serving.scheduling.generation import Generation
from uhd_export.runtime.serving.scheduling.queue import Busy, FairQueue
from uhd_export.runtime.serving.scheduling.request import AnswerStream, Request, Summary

T = TypeVar("T")
log = logging.getLogger(__name__)
# Where memory sets no bound: what comes meanwhile waits for no longer run.
_LONE_CHUNK = 1024


class Closed(Exception):
    """The service is closing and takes no more requests."""


@dataclass(frozen=True)
class Limits:
    """`waiting` is the most requests for which no slot is free; `chunk` the positions of a prompt that run
    between two steps of running answers, `lone_chunk` those where nothing else runs (None: what suits the
    device); `patience` the seconds in which a reader who fell behind must read; `crop_bytes` what the cut
    images of all requests may take together.
    """

    waiting: int = 64
    chunk: int = 256
    lone_chunk: int | None = None
    patience: float = 30.0
    crop_bytes: int = 256 << 20

    def bounded(self, chunk: int | None) -> Self:
        """With `lone_chunk` chosen where it is not, `chunk` (None: no bound), and no `chunk` above it."""
        lone = self.lone_chunk or chunk or _LONE_CHUNK
        return replace(self, chunk=min(self.chunk, lone), lone_chunk=lone)


class Scheduler:
    """Answers requests on `rows`, as many at a time as there are rows."""

    def __init__(
        self,
        rows: Rows,
        language: Engine,
        vision: Callable[[Callable[[], None]], VisionWorker],
        table: EmbeddingTable,
        tokenizer: Tokenizer,
        eos: Iterable[int],
        *,
        encoded: EncodedImages,
        limits: Limits,
    ) -> None:
        self._rows, self._table, self._tokenizer, self._eos = rows, table, tokenizer, tuple(eos)
        self._language = language
        self._embeddings = PromptEmbeddings(language, table, encoded)
        self.limits = limits
        self.listeners: list[Callable[[Summary], None]] = []
        """Told of each answer's end, in the scheduler's thread."""
        self._changed = threading.Condition()
        self._queue: FairQueue[Generation] = FairQueue(limits.waiting)
        self._coming: list[Generation] = []
        self._prefilling: deque[tuple[Generation, Array]] = deque()
        self._running: list[Generation] = []
        self._slots = Slots(rows.count)
        self._current: tuple[Stop, list[Generation]] | None = None
        self._accepting, self._closing = True, False
        self._mean_seconds = 1.0
        self._held = 0
        self.steps = self.stepped = 0
        """Steps so far, and tokens that they made."""
        self._vision = vision(self._wake)
        self._thread = threading.Thread(target=self._loop, name="uhd-language", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._queue) + len(self._coming)

    @property
    def busy_slots(self) -> int:
        """Slots in use."""
        return len(self._slots) - self._slots.free

    @property
    def alive(self) -> bool:
        """Whether requests are taken and worked on."""
        return self._accepting and self._thread.is_alive()

    def submit(self, request: Request) -> AnswerStream:
        """Ask for an answer. Raises Busy where too many wait, Closed at the end."""
        stream = AnswerStream(self._cancelled)
        generation = Generation(request, stream, self._tokenizer, self._eos, self._rows.vocab)
        with self._changed:
            if not self._accepting:
                raise Closed("the service is shutting down")
            # One alone may be larger than what all may hold: nothing else would ever answer it.
            crowded = request.nbytes and 0 < self._held > self.limits.crop_bytes - request.nbytes
            if crowded:
                raise self._busy()
            self.check_room()
            self._held += request.nbytes
            self._queue.push(request.caller, generation)
            self._changed.notify_all()
        return stream

    def check_room(self, coming: int = 0) -> None:
        """Raise Busy where those without a slot, and `coming` that are still read, fill slots and line."""
        with self._changed:
            if self.waiting + coming >= self.limits.waiting + self._slots.free:
                raise self._busy()

    def _busy(self) -> Busy:
        rounds = 1 + self.waiting // len(self._slots)
        return Busy(max(1.0, rounds * self._mean_seconds))

    def close(self, grace: float = 0.0) -> None:
        """Take no more, give what is under way `grace` seconds, end the rest, and the threads."""
        with self._changed:
            self._accepting = False
            self._changed.wait_for(lambda: self._idle or not self._thread.is_alive(), grace)
            self._closing = True
            if self._current:
                self._current[0].request()
            self._changed.notify_all()
        self._thread.join()
        self._vision.close()

    @property
    def _idle(self) -> bool:
        return not (len(self._queue) or self._coming or self._prefilling or self._running)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _cancelled(self) -> None:
        """A reader went: a run that serves nobody else is ended at once."""
        with self._changed:
            if self._current and all(generation.stream.cancelled for generation in self._current[1]):
                self._current[0].request()
            self._changed.notify_all()

    def _loop(self) -> None:
        try:
            while self._wait_for_work():
                self._give_up()
                self._pull()
                self._admit()
                self._prefill()
                self._step()
        finally:
            with self._changed:
                self._accepting = False
            for generation in self._all():
                self._end(generation, "closed")
            self._wake()

    def _all(self) -> list[Generation]:
        prefilling = [generation for generation, _ in self._prefilling]
        return [*self._queue.items(), *self._coming, *prefilling, *self._running]

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do; False at the end."""
        with self._changed:
            self._changed.notify_all()  # `close` may wait for the last answer
            while not self._closing:
                if self._prefilling or any(not g.paused for g in self._running):
                    return True
                everyone = self._all()
                if any(g.stream.cancelled for g in everyone):
                    return True
                if any(g.ready for g in self._coming) and self._slots.free:
                    return True
                if len(self._queue) and len(self._coming) < self._ahead:
                    return True
                now = time.monotonic()
                if any(g.overdue(now, self.limits.patience) for g in everyone):
                    return True
                # Time passes by itself only where there is a deadline, or a reader who may read on.
                ends = [g.deadline - now for g in everyone if g.deadline is not None]
                ends += [0.02] if self._running else []
                # Longer than a thread can wait is until something changes.
                self._changed.wait(max(min(*ends, threading.TIMEOUT_MAX), 0.001) if ends else None)
            return False

    @property
    def _ahead(self) -> int:
        """How many requests may have their images encoded before a slot is free."""
        return len(self._slots)

    def _give_up(self) -> None:
        """End what was cancelled, is late, or is not read."""
        now = time.monotonic()
        for generation in self._all():
            reason = generation.overdue(now, self.limits.patience)
            if reason is not None:
                self._end(generation, reason)

    def _pull(self) -> None:
        """Requests from the line; the vision engine works on their images."""
        while len(self._coming) < self._ahead:
            with self._changed:
                generation = self._queue.pop()
                if generation is None:
                    return
                self._coming.append(generation)
            generation.spend("queue")
            for image in generation.request.images:
                digest = image.planned.digest
                if image.rows is None and digest not in generation.encodings:
                    generation.encodings[digest] = self._vision.encode(image)

    def _admit(self) -> None:
        """Give free slots to requests whose images are encoded, in the order in which they came."""
        for generation in [g for g in self._coming if g.ready]:
            with self._changed:  # it waits or has a slot: none counts it as both
                slot = self._slots.take(generation.keys)
                if slot is None:
                    return
                self._coming.remove(generation)
            generation.slot = slot
            generation.spend("vision" if generation.encodings else "queue")
            start = slot.shared(generation.keys)
            generation.stream.summary.cached_tokens = start
            try:
                embeds = self._embeddings.of(generation, start)
            except Exception:
                log.exception("embeddings")
                self._end(generation, "error")
                continue
            del slot.keys[start:]
            self._rows.rewind(slot.row, start)
            self._prefilling.append((generation, embeds))

    def _prefill(self) -> None:
        """One chunk of the first newcomer's prompt, and its first token after the last chunk."""
        if not self._prefilling:
            return
        generation, embeds = self._prefilling[0]
        slot = generation.place
        done = len(generation.keys) - len(embeds)
        start = self._rows.lengths[slot.row] - done
        size = self.limits.chunk if self._running else self.limits.lone_chunk or _LONE_CHUNK
        chunk = embeds[start : start + size]
        last = start + len(chunk) == len(embeds)
        # Of a chunk before the last nothing is wanted: the less is fetched.
        append = self._rows.append_greedy if generation.greedy or not last else self._rows.append
        scores = self._run([generation], lambda stop: append(slot.row, chunk, stop))
        if scores is None:
            return
        slot.keys.extend(generation.keys[done + start : done + start + len(chunk)])
        if last:
            self._prefilling.popleft()
            if not self._prefilling:  # else the next prompt's activations take it again
                self._language.trim()
            generation.spend("prefill")
            self._running.append(generation)
            self._take(generation, scores)

    def _step(self) -> None:
        """One step of all running answers whose readers keep up."""
        active = [g for g in self._running if not g.paused]
        if not active:
            return
        embeds = self._table.rows([g.token for g in active])
        rows = [g.place.row for g in active]
        step = self._rows.step_greedy if all(g.greedy for g in active) else self._rows.step
        scores = self._run(active, lambda stop: step(rows, embeds, stop))
        if scores is None:
            return
        self.steps, self.stepped = self.steps + 1, self.stepped + len(active)
        for generation, one in zip(active, scores, strict=True):
            generation.place.keys.append(generation.token)
            self._take(generation, one)

    def _take(self, generation: Generation, scores: NDArray[Any] | Greedy) -> None:
        try:
            reason = generation.take(scores, self._rows.context)
        except Exception:
            log.exception("choosing a token")
            reason = "error"
        if reason is not None:
            self._end(generation, reason)

    def _run(self, generations: list[Generation], run: Callable[[Stop], T]) -> T | None:
        """The result of `run`; None where it was stopped, or failed, which ends its generations."""
        stop = Stop()
        with self._changed:
            self._current = (stop, generations)
        try:
            return run(stop)
        except Stopped:
            return None
        except Exception:
            log.exception("language")
            for generation in generations:
                self._end(generation, "error")
            return None
        finally:
            with self._changed:
                self._current = None

    def _end(self, generation: Generation, reason: str) -> None:
        """Take `generation` out of wherever it is, free its slot, and tell its reader."""
        with self._changed:
            self._held -= generation.request.nbytes
            self._queue.remove(generation)
            self._coming = [g for g in self._coming if g is not generation]
            self._prefilling = deque(pair for pair in self._prefilling if pair[0] is not generation)
            running = [g for g in self._running if g is not generation]
            decoded, self._running = len(running) < len(self._running), running
        for encoding in generation.encodings.values():
            self._vision.release(encoding)
        if generation.slot is not None:
            generation.slot.busy = False
        generation.spend("decode" if decoded else "prefill" if generation.slot else "queue")
        generation.finish(reason)
        summary = generation.stream.summary
        if summary.completion_tokens:
            self._mean_seconds += 0.2 * (summary.total - self._mean_seconds)
        for listener in self.listeners:
            listener(summary)
