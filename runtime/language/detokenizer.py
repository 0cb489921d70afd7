"""Streaming text: tokens in, text out as soon as it is certain."""

from tokenizers import Tokenizer

_INCOMPLETE = "\ufffd"


class Detokenizer:
    """Turns a growing list of ids into pieces of text whose sum is the decoded whole, where that is valid.

    After a byte that is no UTF-8 a tokenizer may replace right characters before it too, which are shown by
    then.

    A character may take several tokens, and how a token reads may depend on the one before it, so a
    window of recent tokens is decoded twice, without and with the new one, and the difference is
    new text. It is held back while it ends in an incomplete character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # the window's first token
        self._shown = 0  # tokens whose text was returned

    def push(self, token: int) -> str:
        """The text that `token` completes, possibly empty."""
        self._ids.append(token)
        text = self._new_text()
        if not text or text.endswith(_INCOMPLETE):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return text

    def flush(self) -> str:
        """The text still held back at the end, an incomplete character as U+FFFD."""
        text = self._new_text()
        self._start, self._shown = self._shown, len(self._ids)
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._ids[self._start : self._shown])
        return self._tokenizer.decode(self._ids[self._start :])[len(before) :]
