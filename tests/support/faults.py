"""Faults at the operating system's events, in this process, so that what is left can be looked at.

An audit hook sees every rename, mkdir, remove and opening for writing under a folder, and may let it fail. A
kill is an event from which on every further one fails too, so that no handler or `finally` can tidy up.
"""

import os
import sys
from contextlib import contextmanager

_EVENTS = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link", "os.truncate", "os.chmod"}
_hook = None


class Killed(BaseException):
    """Stands for SIGKILL."""


def _see(event, arguments):
    if _hook is not None and (event in _EVENTS or (event == "open" and _writes(arguments))):
        _hook(event, arguments)


def _writes(arguments):
    _, mode, flags = arguments
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return bool(flags & (os.O_WRONLY | os.O_RDWR))


sys.addaudithook(_see)  # it cannot be taken away again


@contextmanager
def watching(folder, react):
    """For the time of the block `react(number)` is called before each event under `folder`, from 1 on."""
    global _hook
    count = 0
    inside = str(folder)

    def hook(event, arguments):
        nonlocal count
        if any(
            str(os.fsdecode(a)).startswith(inside)
            for a in arguments
            if isinstance(a, (str, bytes, os.PathLike))
        ):
            count += 1
            react(count)

    _hook = hook
    try:
        yield
    finally:
        _hook = None


def events(folder, run):
    """How many events under `folder` there are in `run()`."""
    numbers = [0]
    with watching(folder, numbers.append):
        run()
    return numbers[-1]


def killed_at(number, folder, run):
    """Do `run()` as if it were killed at event `number` under `folder`; True where it was."""

    def react(count):
        if count >= number:
            raise Killed

    with watching(folder, react):
        try:
            run()
        except Killed:
            return True
    return False


def failing_at(number, error, folder, run):
    """Do `run()` where event `number` under `folder` fails with `error`; the exception that comes of it."""

    def react(count):
        if count == number:
            raise error

    with watching(folder, react):
        try:
            run()
        except Exception as raised:
            return raised
    return None
