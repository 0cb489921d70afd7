"""Weights on pages of 2 MB, where the C library is glibc on Linux and the kernel gives such pages on request.

A step of decoding reads every weight once, in pages of 4 KB a million of them, whose addresses the processor
has to look up: on a virtual machine that is a fifth of the step, and up to half where the pages lie badly.
What a session allocates cannot be moved there cheaply afterwards, and its allocator cannot be replaced from
Python. But it asks the C library, which takes from the heap's top whatever fits there: so the heap is grown
beforehand by as much as the weights take, and the kernel is asked for large pages there.
"""

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Parameters of mallopt(3), and advice of madvise(2).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_HUGEPAGE = 14
# glibc's default of the padding, and where its other two settle by themselves once a process has freed an
# array of 32 MB; setting them at all ends that they move.
_PAD, _MAPPED, _TRIM = 128 << 10, 32 << 20, 64 << 20
_NEVER = -1
# How much the heap grows at a time, and what is allocated to make it grow: less than is mapped on its own.
_GROWTH, _BLOCK = 1 << 30, 31 << 20
_MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_SIZE = _MODE.with_name("hpage_pmd_size")


@contextmanager
def large_pages(nbytes: int) -> Iterator[None]:
    """What is allocated within, up to `nbytes`, lies on large pages where there are such.

    What is not used of `nbytes` stays addresses alone, until `return_memory`. Only the main thread takes from
    this heap: in others nothing changes.
    """
    libc, page = _glibc(), large_page_size()
    ours = nbytes > 0 and threading.current_thread() is threading.main_thread()
    if libc is None or page is None or not ours:
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, _MAPPED)
    libc.mallopt(_TRIM_THRESHOLD, _NEVER)  # else the next free gives the grown heap back
    try:
        libc.mallopt(_TOP_PAD, _GROWTH)
        _grow(libc, nbytes, page)
        libc.mallopt(_TOP_PAD, _PAD)
        yield
    finally:
        libc.mallopt(_TRIM_THRESHOLD, _TRIM)


def large_page_size() -> int | None:
    """Bytes of a large page that the kernel gives to those who ask; None where it gives none."""
    with suppress(OSError, ValueError):
        if "[never]" not in _MODE.read_text():
            return int(_SIZE.read_text())
    return None


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "gnu_get_libc_version"):
        return None
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    libc.sbrk.argtypes, libc.sbrk.restype = [ctypes.c_ssize_t], ctypes.c_void_p
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def _grow(libc: ctypes.CDLL, nbytes: int, page: int) -> None:
    """Leave at least `nbytes` at the top of the heap, with large pages asked for where it grew."""
    blocks, end = [], libc.sbrk(0)
    for _ in range(-(-nbytes // _BLOCK)):
        blocks.append(libc.malloc(_BLOCK))
        start, end = -(-end // page) * page, libc.sbrk(0)
        if end > start:  # else it did not grow, or cannot: then nothing changes
            libc.madvise(start, (end - start) // page * page, _HUGEPAGE)
    for block in blocks:
        libc.free(block)
