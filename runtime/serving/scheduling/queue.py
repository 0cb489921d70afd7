"""The waiting line: fair between callers, and never longer than its limit."""

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Busy(Exception):
    """The line is full; `retry_after` is the seconds in which a place should be free."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"too many requests are waiting; try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class FairQueue(Generic[T]):
    """Items by caller: callers take turns, the items of one come in their order."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lines: OrderedDict[str, deque[T]] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def full(self) -> bool:
        """Whether nothing more can wait."""
        return self._size >= self.limit

    def push(self, caller: str, item: T) -> None:
        """Add an item at the end of its caller's line, also to a full queue: see `full`."""
        self._lines.setdefault(caller, deque()).append(item)
        self._size += 1

    def pop(self) -> T | None:
        """The next item: the first of the caller whose turn it is. None where nobody waits."""
        if not self._lines:
            return None
        caller, line = self._lines.popitem(last=False)
        item = line.popleft()
        self._size -= 1
        if line:
            self._lines[caller] = line  # behind all others
        return item

    def items(self) -> list[T]:
        """All that wait, in no order that matters."""
        return [item for line in self._lines.values() for item in line]

    def remove(self, item: T) -> None:
        """Take out an item that waits."""
        for caller, line in list(self._lines.items()):
            if item in line:
                line.remove(item)
                self._size -= 1
                if not line:
                    del self._lines[caller]
                return
