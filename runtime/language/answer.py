"""An answer: text as it is generated, why it ended, and what it took."""

import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Self

from uhd_export.runtime.engines.base import Stop, Stopped
from uhd_export.runtime.language.detokenizer import Detokenizer
from uhd_export.runtime.stopwatch import Stopwatch


@dataclass
class Progress:
    """How far one answer is: written by the generator, read through `Answer`."""

    prompt_tokens: int
    watch: Stopwatch
    cached_tokens: int = 0
    started: bool = False
    finish_reason: str | None = None
    ids: list[int] = field(default_factory=list)
    stop: Stop = field(default_factory=Stop)


class Answer(Iterator[str]):
    """The text of an answer, in pieces as they are generated: `for piece in answer`.

    Nothing runs before the first piece is asked for. From then on the answer keeps other threads waiting
    until it is read to its end or closed; it is a context manager for those who may stop early.
    """

    def __init__(
        self,
        tokens: Generator[int, None, None],
        progress: Progress,
        detokenizer: Detokenizer,
        eos: tuple[int, ...],
    ) -> None:
        self._tokens, self._progress, self._detokenizer, self._eos = tokens, progress, detokenizer, eos
        self._lock = threading.RLock()
        self._closed = False
        self.text = ""
        """All that was read so far."""

    @property
    def finish_reason(self) -> str | None:
        """ "stop", "length" (max_new_tokens) or "context" (cache full); None until the answer has ended."""
        return self._progress.finish_reason

    @property
    def prompt_tokens(self) -> int:
        """Positions of the prompt, those of images included."""
        return self._progress.prompt_tokens

    @property
    def cached_tokens(self) -> int:
        """Positions of the prompt that were in the cache, so that they were not run again."""
        return self._progress.cached_tokens

    @property
    def generated_tokens(self) -> int:
        """Tokens generated so far, the end-of-text token included."""
        return len(self._progress.ids)

    @property
    def ids(self) -> list[int]:
        """The tokens generated so far, without the end-of-text token."""
        return [token for token in self._progress.ids if token not in self._eos]

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds so far by stage: image, vision, prefill and decode."""
        return dict(self._progress.watch.seconds)

    @property
    def started(self) -> bool:
        """Whether any of it was asked for."""
        return self._progress.started

    def __next__(self) -> str:
        """The next piece. Raises UhdError where another prompt was run meanwhile, or the pipeline closed."""
        with self._lock:
            if self._closed:
                raise StopIteration
            try:
                piece = self._next_piece()
            except Stopped:  # by `close`
                raise StopIteration from None
            self.text += piece
            return piece

    def _next_piece(self) -> str:
        for token in self._tokens:
            if token not in self._eos and (piece := self._detokenizer.push(token)):
                return piece
        piece = self._detokenizer.flush()
        if not piece:
            raise StopIteration
        return piece

    def close(self) -> None:
        """End the answer where it is, also from another thread what runs for it now; others may go on."""
        self._progress.stop.request()
        with self._lock:
            self._closed = True
            self._tokens.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = self.finish_reason or ("closed" if self._closed else "unfinished")
        return (
            f"<Answer {self.text!r}: {state}, {self.generated_tokens} tokens after {self.prompt_tokens}, "
            f"{self.cached_tokens} of them cached>"
        )
