"""Streaming text: tokens in, text out as soon as it is certain."""

import re
from collections.abc import Sequence
from itertools import groupby

from tokenizers import Tokenizer

_INCOMPLETE = "\ufffd"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of `ids` without special tokens; each cut character is one U+FFFD.

    Where tokens are bytes, the library replaces every byte of a run that holds a wrong one, the right
    characters in it too.
    """
    text = tokenizer.decode(ids)
    if _INCOMPLETE not in text or tokenizer.decoder is None or tokenizer.token_to_id("<0x00>") is None:
        return text
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    tokens = [tokenizer.id_to_token(number) for number in ids if number not in special]
    return str(tokenizer.decoder.decode(_valid([token for token in tokens if token is not None])))


def _valid(tokens: list[str]) -> list[str]:
    """`tokens` with one U+FFFD in place of the bytes of each character that is cut."""
    out: list[str] = []
    for is_bytes, run in groupby(tokens, lambda token: _BYTE.fullmatch(token) is not None):
        if not is_bytes:
            out += run
            continue
        text = bytes(int(token[3:5], 16) for token in run).decode(errors="replace")
        for character in text:
            known = character != _INCOMPLETE
            out += [f"<0x{byte:02X}>" for byte in character.encode()] if known else [_INCOMPLETE]
    return out


class TokenBytes:
    """Single tokens as they are in a text: an answer's, joined, are its UTF-8 (a space may precede it)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        # GPT-2's way to write bytes as characters, which its decoder alone reads.
        byte_level = tokenizer.decoder is not None and tokenizer.decoder.decode(["\u0120"]) == " "
        self._alphabet = _byte_alphabet() if byte_level else {}

    def read(self, token: int) -> tuple[str, bytes | None]:
        """How `token` reads, U+FFFD where it is a part of a character, and its bytes.

        A special token, which is in no text, has its name and None; what is no token reads as nothing.
        """
        name = self._tokenizer.id_to_token(token) or ""
        if token in self._special:
            return name, None
        known = self._bytes(name)
        return known.decode(errors="replace"), known

    def _bytes(self, name: str) -> bytes:
        if self._alphabet and all(character in self._alphabet for character in name):
            return bytes(self._alphabet[character] for character in name)
        if (byte := _BYTE.fullmatch(name)) is not None:
            return bytes([int(byte[1], 16)])
        if self._tokenizer.decoder is None:
            return name.encode()
        # After another token: the space that begins a text is taken from it.
        return str(self._tokenizer.decoder.decode(["x", name]))[1:].encode()


def _byte_alphabet() -> dict[str, int]:
    """The byte of each character of GPT-2's alphabet: printable ones stand for themselves."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


class Detokenizer:
    """Turns a growing list of ids into pieces of text whose sum is the decoded whole.

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
        before = decode(self._tokenizer, self._ids[self._start : self._shown])
        return decode(self._tokenizer, self._ids[self._start :])[len(before) :]
