"""What a caller wants, and what comes back while it is made."""

import asyncio
import functools
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

from uhd_export.runtime.language.sequence import PromptSequence
from uhd_export.runtime.serving.images.cutting import CutImage
from uhd_export.runtime.serving.sampling.choice import Choosing, Chosen
from uhd_export.runtime.serving.sampling.grammar import Grammar


@dataclass(frozen=True)
class Request:
    """A prompt with its images, and how it is answered.

    `max_tokens` None goes on to the end of the context. `stop` are texts that end the answer. `seconds` is
    the time from submission after which it is given up. `caller` is whose turn it is in the waiting line.
    `prepare_seconds` is what reading and cutting the images took before.
    """

    sequence: PromptSequence
    images: tuple[CutImage, ...] = ()
    max_tokens: int | None = None
    choosing: Choosing = field(default_factory=Choosing)
    stop: tuple[str, ...] = ()
    grammar: Grammar | None = None
    seconds: float | None = None
    caller: str = ""
    prepare_seconds: float = 0.0

    @property
    def nbytes(self) -> int:
        """Size of the images' crops, which it holds until it is answered."""
        return sum(image.nbytes for image in self.images)


@dataclass(frozen=True)
class Piece:
    """A part of the answer: text, and the tokens that made it certain."""

    text: str
    tokens: tuple[Chosen, ...] = ()


@dataclass
class Summary:
    """How an answer ended, and what it took.

    `reason` is "stop", "length" (max_tokens), "context" (the slot is full), "cancelled", "slow" (nobody read
    it), "deadline", "closed" (the service) or "error". `seconds` are by stage: image, queue, vision, prefill,
    decode; `first_token` those from submission.
    """

    reason: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    first_token: float | None = None
    total: float = 0.0
    images: int = 0
    cached_images: int = 0


class AnswerStream:
    """Pieces of an answer, from the thread that makes them to the one that reads them."""

    def __init__(self, on_cancel: Callable[[], None]) -> None:
        self.summary = Summary()
        self.cancelled = False
        self.read_at = time.monotonic()
        """When the reader last took something."""
        self._on_cancel = on_cancel
        self._pieces: deque[Piece] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._notify: Callable[[], object] | None = None

    @property
    def pending(self) -> int:
        """Pieces that were not read yet."""
        return len(self._pieces)

    @property
    def ended(self) -> bool:
        """Whether no more pieces will come."""
        return self._ended

    def put(self, piece: Piece) -> None:
        """Add a piece; by the one who makes them."""
        with self._changed:
            self._pieces.append(piece)
            self._wake()

    def end(self) -> None:
        """No more pieces: `summary` is final."""
        with self._changed:
            self._ended = True
            self._wake()

    def cancel(self) -> None:
        """The reader wants no more."""
        with self._changed:
            if self.cancelled or self._ended:
                return
            self.cancelled = True
        self._on_cancel()

    def __iter__(self) -> Iterator[Piece]:
        """The pieces, waiting for each."""
        while (piece := self._next()) is not None:
            yield piece

    def text(self) -> str:
        """All of the answer."""
        return "".join(piece.text for piece in self)

    async def pieces(self) -> AsyncIterator[Piece]:
        """As iteration, in an event loop."""
        loop, event = asyncio.get_running_loop(), asyncio.Event()
        with self._changed:
            self._notify = functools.partial(loop.call_soon_threadsafe, event.set)
        while True:
            event.clear()
            with self._changed:
                piece, ended = self._take(), self._ended
            if piece is not None:
                yield piece
            elif ended:
                return
            else:
                await event.wait()

    def _next(self) -> Piece | None:
        with self._changed:
            self._changed.wait_for(lambda: self._pieces or self._ended)
            return self._take()

    def _take(self) -> Piece | None:
        self.read_at = time.monotonic()
        return self._pieces.popleft() if self._pieces else None

    def _wake(self) -> None:
        self._changed.notify_all()
        if self._notify is not None:
            try:
                self._notify()
            except RuntimeError:  # the reader's event loop is closed, so nobody reads
                self._notify = None
