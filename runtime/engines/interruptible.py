"""Ctrl-C during a long call of C code: Python handles signals between its own steps only.

In the main thread, where handlers run, the call goes to a helper thread and the main thread waits in Python.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from uhd_export.runtime.engines.base import Stop

T = TypeVar("T")


class Caller:
    """Makes calls that an exception of a signal handler ends; see `call`."""

    def __init__(self) -> None:
        self._helper: ThreadPoolExecutor | None = None

    def call(self, run: Callable[[Stop], T], stop: Stop | None) -> T:
        """`run(stop)`. Where a signal handler raises meanwhile, the run is ended; the exception goes on."""
        stop = stop or Stop()
        if threading.current_thread() is not threading.main_thread():
            return run(stop)
        if self._helper is None:
            self._helper = ThreadPoolExecutor(1, thread_name_prefix="uhd-engine")
        future = self._helper.submit(run, stop)
        try:
            return future.result()
        except BaseException:
            if not future.done():  # raised here, by a handler
                stop.request()
                _wait(future)
            raise

    def close(self) -> None:
        """End the helper thread."""
        if self._helper is not None:
            self._helper.shutdown()
            self._helper = None


def _wait(future: "Future[T]") -> None:
    """Until the run has ended, which it does at once: what it works on must not go while it does."""
    while True:
        try:
            future.exception()
            return
        except KeyboardInterrupt:  # once is enough
            continue
