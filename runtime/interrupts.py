"""Ctrl-C and SIGTERM end a command alike, wherever they meet it; only a conversation tells them apart."""

import signal
import threading
from types import FrameType
from typing import NoReturn

from uhd_export.runtime.errors import UhdError

_received = threading.Event()


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends the program also where Ctrl-C means less."""


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    _received.set()
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def handle_interrupts() -> None:
    """From now on SIGINT and SIGTERM raise KeyboardInterrupt, and `was_interrupt` remembers it.

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


def was_interrupt(error: Exception) -> bool:
    """Whether `error` may be what became of an interrupt since `handle_interrupts`.

    A UhdError that was raised on its own, not while another exception was handled, has its own reason.
    """
    own = isinstance(error, UhdError) and error.__context__ is None
    return _received.is_set() and not own


def forget_interrupt() -> None:
    """The interrupt has been dealt with: errors from now on are none."""
    _received.clear()
