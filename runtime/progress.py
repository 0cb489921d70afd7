"""Progress on the terminal's error stream, silent where that is no terminal."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from uhd_export.runtime.units import format_bytes

Progress = Callable[[int, int], None]
"""How every long task tells how far it is: called with (done, total)."""

# An estimate from less than this says nothing.
_SECONDS, _SHARE = 2.0, 0.02


class Bar:
    """One line of progress; `on_share` is told the share that is done, where it is known."""

    def __init__(
        self,
        progress: RichProgress,
        task: TaskID,
        total: int | None,
        on_share: Callable[[float], None] = lambda share: None,
    ) -> None:
        self._progress, self._task, self._total = progress, task, total
        self._done, self._on_share = 0, on_share

    def advance(self, steps: int = 1) -> None:
        """`steps` more are done."""
        self._show(self._done + steps, self._total)

    def set(self, done: int, total: int) -> None:
        """`done` of `total` steps are done."""
        self._show(done, total)

    def finish(self) -> None:
        """All is done, whatever was counted."""
        total = self._total or 1
        self._show(total, total)

    def _show(self, done: int, total: int | None) -> None:
        self._done, self._total = done, total
        at = self._progress.tasks[self._progress.task_ids.index(self._task)].elapsed
        self._progress.update(self._task, completed=done, total=total, at=at)
        if total:
            self._on_share(min(done / total, 1.0))


class _Count(ProgressColumn):
    """How much of how much: steps, bytes in their unit, or stages of a whole."""

    def render(self, task: Task) -> Text:
        done, total = task.fields.get("stages") or (int(task.completed), task.total)
        if task.fields.get("nbytes"):
            of = "?" if total is None else format_bytes(int(total))
            return Text(f"{format_bytes(done)} of {of}")
        return Text(f"{done}/{'?' if total is None else int(total)}")


class _Left(ProgressColumn):
    """The time left, from the mean pace since the task began; nothing while that says nothing.

    Stages of a whole have no common pace: it is measured in the seconds that they were expected to take.
    """

    def render(self, task: Task) -> Text:
        at = task.fields.get("at")
        left = None if at is None else seconds_left(at, task.elapsed or 0.0, task.completed, task.total)
        return Text("" if left is None else f"about {left:,.0f} s left")


def seconds_left(at: float, elapsed: float, done: float, total: float | None) -> float | None:
    """What the rest takes at the mean pace until `at`, when `done` of `total` were done, less the time since.

    None where too little is done to say, or one step takes longer than was foretold for all.
    """
    if not total or at < _SECONDS or done < total * _SHARE or done >= total:
        return None
    left = at * (total - done) / done - (elapsed - at)
    return left if left > 0 else None


class _Overall:
    """The bar of a whole command, in whose display the bars of its stages appear and vanish.

    What it counts are the seconds that stages are expected to take, of which the mean pace since it began
    makes the machine's own; a stage that nobody foresaw counts for nothing.
    """

    current: "_Overall | None" = None

    def __init__(self, progress: RichProgress, label: str) -> None:
        self.progress, self._label = progress, label
        self._to_come: dict[str, float] = {}
        self._passed, self._now, self._share = 0.0, 0.0, 0.0
        self._ended, self._running = 0, False
        self._task = progress.add_task(label, total=None, stages=(0, None))

    def expect(self, seconds: Mapping[str, float]) -> None:
        """Stages that are to come."""
        self._to_come |= seconds
        self._show()

    def begin(self, stage: str) -> None:
        """A stage begins: the bar names it."""
        self.progress.update(self._task, description=f"{self._label}: {stage}")
        self._now, self._share, self._running = self._to_come.pop(stage, 0.0), 0.0, True
        self._show()

    def share(self, share: float) -> None:
        """So much of the stage that is under way is done."""
        self._share = share
        self._show()

    def end(self) -> None:
        """A stage is over."""
        self._passed, self._ended = self._passed + self._now, self._ended + 1
        self._now, self._share, self._running = 0.0, 0.0, False
        self._show()

    def finish(self) -> None:
        """Everything is over, whatever was expected."""
        self._to_come.clear()
        self._show()
        self.progress.update(self._task, description=self._label, completed=1, total=1)

    def _show(self) -> None:
        total = self._passed + self._now + sum(self._to_come.values())
        self.progress.update(
            self._task,
            completed=self._passed + self._share * self._now,
            total=total or None,
            at=self.progress.tasks[self.progress.task_ids.index(self._task)].elapsed,
            stages=(self._ended, self._ended + self._running + len(self._to_come)),
        )


def _display(show: bool) -> RichProgress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), _Count(), TimeElapsedColumn(), _Left())
    return RichProgress(*columns, console=console, disable=not (show and console.is_terminal))


@contextmanager
def overall_bar(label: str, *, show: bool = True) -> Iterator[None]:
    """One bar for the whole block: every `progress_bar` within is one of its stages, named in it."""
    if _Overall.current is not None:
        yield  # a command within a command
        return
    with _display(show) as progress:
        _Overall.current = overall = _Overall(progress, label)
        try:
            yield
            overall.finish()
        finally:
            _Overall.current = None


def expect(seconds: Mapping[str, float]) -> None:
    """The whole bar that there is, if any, learns what stages are to come, and how long each may take."""
    if _Overall.current is not None:
        _Overall.current.expect(seconds)


@contextmanager
def progress_bar(
    label: str, total: int | None = None, *, show: bool = True, nbytes: bool = False
) -> Iterator[Bar]:
    """A bar called `label` for the time of the block; `total` None where it is not known yet.

    It ends full where the block ends without an error. `nbytes`: what is counted is bytes. With `show` false,
    or where stderr is no terminal, nothing is drawn.
    """
    overall = _Overall.current if show else None
    if overall is None:
        with _display(show) as progress:
            bar = Bar(progress, progress.add_task(label, total=total, nbytes=nbytes), total)
            yield bar
            bar.finish()
        return
    overall.begin(label)
    task = overall.progress.add_task(f"  {label}", total=total, nbytes=nbytes)
    try:
        yield Bar(overall.progress, task, total, overall.share)
        overall.end()  # and the stage's own bar vanishes
    finally:
        overall.progress.remove_task(task)


@contextmanager
def status(label: str) -> Iterator[None]:
    """`label` with a spinner for the time of the block, which must not print; nothing of it stays."""
    console = Console(stderr=True)
    with console.status(label) if console.is_terminal else nullcontext():
        yield
