"""Turns: who may use the engines, whose key-value cache holds one prompt at a time."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from uhd_export.runtime.engines.base import Stop, Stopped
from uhd_export.runtime.errors import UhdError


class Turn:
    """The right of one streaming answer to go on."""


class Turns:
    """Callers of several threads take turns: a call runs alone, an answer keeps its turn between its tokens.

    Whoever comes while another thread's answer is unfinished waits until it is finished or closed. A thread
    never waits for itself: what it asks anew ends its own earlier answer, which says so when it is read on.
    `check` is called before anything runs, and raises where nothing should.
    """

    def __init__(self, check: Callable[[], None] = lambda: None) -> None:
        self._check = check
        # Held while anything runs; waiting for a turn lets it go.
        self._state = threading.Condition(threading.RLock())
        self._holder: Turn | None = None
        self._thread = 0
        self.closed = False

    def check(self) -> None:
        """Raise UhdError where the pipeline is closed."""
        if self.closed:
            raise UhdError("pipeline: it is closed; open the bundle again")
        self._check()

    @contextmanager
    def call(self, *, ends_answer: bool = True) -> Iterator[None]:
        """One call alone; with `ends_answer` an earlier answer of this thread cannot go on after it."""
        with self._state:
            self._wait()
            if ends_answer:
                self._holder = None
            yield

    @contextmanager
    def begin(self, turn: Turn, stop: Stop) -> Iterator[None]:
        """Take `turn`, and run its first part. Raises Stopped where `stop` is requested before."""
        # Whoever requests it takes `_state`: it must not be held where `ending` begins, ends, or a run does.
        with stop.ending(self._wake), self._state:
            self._wait(stop)
            self._holder, self._thread = turn, threading.get_ident()
        with self.go_on(turn):
            yield

    @contextmanager
    def go_on(self, turn: Turn) -> Iterator[None]:
        """Run a further part of `turn`; UhdError where it was ended meanwhile."""
        with self._state:
            self.check()
            if self._holder is not turn:
                raise UhdError("generation: another prompt was run meanwhile; finish an answer first")
            self._thread = threading.get_ident()
            yield

    def end(self, turn: Turn) -> None:
        """Give `turn` back, if it is still held."""
        with self._state:
            if self._holder is turn:
                self._holder = None
                self._state.notify_all()

    @contextmanager
    def closing(self) -> Iterator[bool]:
        """Everything that comes later is refused. True the first time, where nothing runs any more."""
        with self._state:
            first, self.closed, self._holder = not self.closed, True, None
            self._state.notify_all()
            yield first

    def _wake(self) -> None:
        with self._state:
            self._state.notify_all()

    def _wait(self, stop: Stop | None = None) -> None:
        """Until no other thread's answer is unfinished. Raises Stopped where `stop` is requested first."""
        me = threading.get_ident()
        while not self.closed and self._holder is not None and self._thread != me:
            if stop is not None and stop.requested:
                raise Stopped
            self._state.wait()
        self.check()
