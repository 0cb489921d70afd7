"""One at a time: whoever writes an output holds its lock, which the system lets go of when it dies."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from uhd_export.runtime.errors import UhdError

try:
    import fcntl
except ImportError:  # Windows, where nothing is built
    fcntl = None  # type: ignore[assignment]


@contextmanager
def exclusive(out: Path) -> Iterator[None]:
    """Nobody else writes the output `out` for the time of the block. Raises UhdError where somebody does.

    The lock is on an empty file beside `out`, which goes at the end. One that a killed process left says
    nothing, and is taken over.
    """
    if fcntl is None:
        yield
        return
    path = out.with_name(f".{out.name}.uhd-lock")
    handle = _take(path, out)
    try:
        yield
    finally:
        try:
            with suppress(OSError):
                path.unlink()  # while it is held, so that nobody's but this one goes
        finally:
            os.close(handle)


def _take(path: Path, out: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(handle, path):
                return handle
        except BlockingIOError:
            os.close(handle)
            raise UhdError(f"output {out}: another process is writing it; wait for it, or stop it") from None
        except OSError:  # a file system without locks
            return handle
        os.close(handle)  # its holder removed it just now


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
