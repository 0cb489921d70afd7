"""JSON from files that others wrote: of a sane size and depth, and nothing in it that breaks a reader."""

import json
from pathlib import Path

from uhd_export.runtime.errors import UhdError

LARGEST = 64 << 20
"""Bytes of the largest file that is read: a vocabulary has some ten million."""
DEEPEST = 64
"""Levels of the deepest value; no file of ours or of Hugging Face has ten."""
_MOST_DIGITS = 40


def read_json(path: str | Path, remedy: str = "") -> object:
    """The value in the file at `path`. Raises UhdError naming it, with `remedy` behind the reason.

    FileNotFoundError and NotADirectoryError are left to the caller, who knows what a missing file means.
    """
    behind = f"; {remedy}" if remedy else ""
    try:
        with Path(path).open("rb") as file:
            content = file.read(LARGEST + 1)
        return parse_json(content)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (ValueError, OSError) as error:
        raise UhdError(f"{path}: not readable as JSON ({error}){behind}") from None


def parse_json(content: str | bytes) -> object:
    """The value in `content`. Raises ValueError: no JSON, no UTF-8, too large, too deep, a giant number."""
    if len(content) > LARGEST:
        raise ValueError(f"more than {LARGEST >> 20} MiB")
    try:
        value = json.loads(content if isinstance(content, str) else content.decode(), parse_int=_whole)
    except RecursionError:
        raise ValueError(f"more than {DEEPEST} levels") from None
    _check(value)
    return value


def _whole(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _check(value: object) -> None:
    """Raise ValueError where `value` is too deep, or holds half of a character (a lone surrogate)."""
    level, values = 0, [value]
    while values:
        if level > DEEPEST:
            raise ValueError(f"more than {DEEPEST} levels")
        below: list[object] = []
        for item in values:
            if isinstance(item, str):
                try:
                    item.encode()
                except UnicodeEncodeError:
                    raise ValueError("a lone surrogate in a text") from None
            elif isinstance(item, dict):
                below += item.keys()
                below += item.values()
            elif isinstance(item, list):
                below += item
        level, values = level + 1, below
