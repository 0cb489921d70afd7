"""One request on its way through the scheduler: what it waits for, and its answer as it grows."""

import time
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray
from tokenizers import Tokenizer

from uhd_export.runtime.language.decoder import Greedy, check_finite
from uhd_export.runtime.serving.cache.slots import Slot
from uhd_export.runtime.serving.images.worker import Encoding
from uhd_export.runtime.serving.sampling.choice import Chooser, Chosen
from uhd_export.runtime.serving.sampling.text import StoppableText
from uhd_export.runtime.serving.scheduling.request import AnswerStream, Piece, Request

# An answer whose reader has so many pieces to read is not continued until some are read.
MOST_PENDING = 64


class Generation:
    """The scheduler's record of a request; only its thread changes it."""

    def __init__(
        self, request: Request, stream: AnswerStream, tokenizer: Tokenizer, eos: Sequence[int], vocab: int
    ) -> None:
        self.request, self.stream = request, stream
        self.keys = request.sequence.keys
        self.submitted = time.monotonic()
        self.deadline = None if request.seconds is None else self.submitted + request.seconds
        self.encodings: dict[str, Encoding] = {}
        self.slot: Slot | None = None
        self.token = -1
        """The last token of the answer, once there is one, which is not in the cache yet."""
        self._eos = frozenset(eos)
        self._chooser = Chooser(request.choosing, vocab)
        self._grammar = None if request.grammar is None else request.grammar.follow()
        self._text = StoppableText(tokenizer, request.stop)
        self._untold: list[Chosen] = []
        summary = stream.summary
        summary.prompt_tokens, summary.images = len(self.keys), len(request.images)
        summary.cached_images = sum(image.rows is not None for image in request.images)
        summary.seconds = dict.fromkeys(("image", "queue", "vision", "prefill", "decode"), 0.0)
        summary.seconds["image"] = request.prepare_seconds
        self._mark = self.submitted

    @property
    def place(self) -> Slot:
        """The slot of an answer that has one, as all do that run."""
        if self.slot is None:
            raise RuntimeError("generation: it has no slot yet")
        return self.slot

    @property
    def ready(self) -> bool:
        """Whether all its images are encoded."""
        return all(encoding.done for encoding in self.encodings.values())

    @property
    def paused(self) -> bool:
        """Whether its reader has to read first."""
        return self.stream.pending >= MOST_PENDING

    def spend(self, stage: str) -> None:
        """The time since the last call, or since submission, went to `stage`."""
        now = time.monotonic()
        self.stream.summary.seconds[stage] += now - self._mark
        self._mark = now

    def overdue(self, now: float, patience: float) -> str | None:
        """Why it has to be given up, if it has to."""
        if self.stream.cancelled:
            return "cancelled"
        if self.deadline is not None and now > self.deadline:
            return "deadline"
        if self.paused and now - self.stream.read_at > patience:
            return "slow"
        return None

    @property
    def greedy(self) -> bool:
        """Whether it needs no more of the logits than which is the highest."""
        return self._grammar is None and self.request.choosing.greedy

    def take(self, scores: NDArray[Any] | Greedy, context: int) -> str | None:
        """Choose the next token by (vocab,) logits, or take the greedy one; why the answer ends, if it does.

        Raises UhdError where the logits are no numbers.
        """
        if isinstance(scores, Greedy):
            chosen = Chosen(scores.checked())
        else:
            allowed = None if self._grammar is None else self._grammar.allowed()
            chosen = self._chooser.choose(check_finite(scores), allowed)
        self.token, summary = chosen.token, self.stream.summary
        if summary.first_token is None:
            summary.first_token = time.monotonic() - self.submitted
        summary.completion_tokens += 1
        if chosen.token in self._eos:
            return "stop"
        if self._grammar is not None:
            self._grammar.accept(chosen.token)
        self._tell(self._text.push(chosen.token), chosen)
        if self._text.stopped or (self._grammar is not None and self._grammar.done):
            return "stop"
        if summary.completion_tokens == self.request.max_tokens:
            return "length"
        return "context" if summary.prompt_tokens + summary.completion_tokens > context else None

    def finish(self, reason: str) -> None:
        """Tell what is held back, and the end."""
        if reason in ("stop", "length", "context"):
            text = self._text.flush()
            if text or self._untold:
                self.stream.put(Piece(text, tuple(self._untold)))
        summary = self.stream.summary
        summary.reason, summary.total = reason, time.monotonic() - self.submitted
        self.stream.end()

    def _tell(self, text: str, chosen: Chosen) -> None:
        self._untold.append(chosen)
        if text:
            self.stream.put(Piece(text, tuple(self._untold)))
            self._untold = []
