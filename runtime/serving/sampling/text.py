"""Text of an answer as it grows: stop sequences end it and are never shown."""

from collections.abc import Sequence

from tokenizers import Tokenizer

from uhd_export.runtime.language.detokenizer import Detokenizer


class StoppableText:
    """Tokens in, text out as soon as it is certain, up to the first of the `stop` sequences."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._detokenizer, self._stop = Detokenizer(tokenizer), tuple(stop)
        self._held = ""
        self.stopped = False
        """Whether a stop sequence was found."""

    def push(self, token: int) -> str:
        """The text that `token` makes certain, possibly empty."""
        return self._show(self._detokenizer.push(token))

    def flush(self) -> str:
        """What is still held back when the answer ends."""
        shown = self._show(self._detokenizer.flush())
        if self.stopped:
            return shown
        held, self._held = self._held, ""
        return shown + held

    def _show(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        places = [place for place in (self._held.find(stop) for stop in self._stop) if place >= 0]
        if places:
            self.stopped = True
            shown, self._held = self._held[: min(places)], ""
            return shown
        # What may be the beginning of a stop sequence waits for what follows.
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`, fewer than all of it."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
