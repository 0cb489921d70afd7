"""Progress on the terminal's error stream, silent where that is no terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

Progress = Callable[[int, int], None]
"""How every long task tells how far it is: called with (done, total)."""


class Bar:
    """One line of progress."""

    def __init__(self, progress: RichProgress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, steps: int = 1) -> None:
        """`steps` more are done."""
        self._progress.advance(self._task, steps)

    def set(self, done: int, total: int) -> None:
        """`done` of `total` steps are done."""
        self._progress.update(self._task, completed=done, total=total)


@contextmanager
def progress_bar(label: str, total: int | None = None, *, show: bool = True) -> Iterator[Bar]:
    """A bar called `label` for the time of the block; `total` None where it is not known yet.

    With `show` false, or where stderr is no terminal, nothing is drawn.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=console, disable=not (show and console.is_terminal)) as progress:
        yield Bar(progress, progress.add_task(label, total=total))


@contextmanager
def status(label: str) -> Iterator[None]:
    """`label` with a spinner for the time of the block, which must not print; nothing of it stays."""
    console = Console(stderr=True)
    with console.status(label) if console.is_terminal else nullcontext():
        yield
