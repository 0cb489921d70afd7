"""Reading a tokenizer.json, and what the tokenizer library does with one that contradicts itself: it panics.

A panic of Rust code is no Exception in Python, and writes to the error stream before it arrives.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer

from uhd_export.runtime.errors import UhdError

_LARGEST = 256 << 20
_PROBE = "An image <image> of 3 cats,\n\té漢🙂"


def read_tokenizer(path: Path, remedy: str) -> Tokenizer:
    """The tokenizer in `path`, which has shown that it can encode and decode.

    Raises UhdError, with `remedy`, where it is missing or broken.
    """
    if not path.is_file():
        raise UhdError(f"tokenizer {path}: no such file; {remedy}")
    if path.stat().st_size > _LARGEST:
        raise UhdError(f"tokenizer {path}: more than {_LARGEST >> 20} MiB; {remedy}")
    with library_errors(f"tokenizer {path}: cannot be read", remedy), _no_stderr():
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.decode(tokenizer.encode(_PROBE).ids)
        tokenizer.encode("")
    return tokenizer


@contextmanager
def library_errors(what: str, remedy: str) -> Iterator[None]:
    """Whatever the library raises, a panic too, becomes a UhdError: `what` (reason); `remedy`."""
    try:
        yield
    except UhdError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # Ctrl-C
        raise UhdError(f"{what} ({str(error)[:300]}); {remedy}") from None


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Nothing is written to the process's error stream, where a panic would tell of itself."""
    try:
        sys.stderr.flush()
        saved = os.dup(2)
    except (OSError, ValueError, AttributeError):  # there is none
        yield
        return
    try:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
