"""Ctrl-C and SIGTERM end a command alike, wherever they meet it."""

import signal
import threading
from types import FrameType
from typing import NoReturn

_received = threading.Event()


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    _received.set()
    raise KeyboardInterrupt


def handle_interrupts() -> None:
    """From now on SIGINT and SIGTERM raise KeyboardInterrupt, and `interrupted` remembers it.

    The exception alone is not enough: C code that is called back may replace it by one of its own, as numpy
    does ("could not determine the shape of object type"), which would read as a defect of the program.
    A SIGINT that is ignored, as in a shell's background jobs, stays so. Only the main thread may set
    handlers; in another this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    _received.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


def interrupted() -> bool:
    """Whether a signal has come since `handle_interrupts`."""
    return _received.is_set()
