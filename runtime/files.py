"""Files that are whole or not there: written under a temporary name, on disk before they get their own."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path` to write; where the block ends without an error it becomes `path`.

    Its content is on disk before the name changes, so that not even a power cut leaves half a file. After
    any error, Ctrl-C included, `path` is as it was and the temporary file is gone.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: str | Path, content: str | bytes | memoryview) -> None:
    """Write `content`, a text as UTF-8, so that `path` is whole or as it was (see `replacing`)."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def cache_folder() -> Path:
    """Where engines, kernels and digests are kept: $UHD_EXPORT_CACHE, else in the user's cache folder."""
    chosen = os.environ.get("UHD_EXPORT_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("LOCALAPPDATA") or os.environ.get("XDG_CACHE_HOME")
    return Path(base or Path.home() / ".cache") / "uhd-export"


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    if os.name == "nt":  # knows neither for what is open for reading alone
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
