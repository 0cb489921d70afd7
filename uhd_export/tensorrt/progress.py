"""TensorRT's nested build phases as one number that grows."""

from types import ModuleType
from typing import Any

from uhd_export.runtime.progress import Progress

_TOTAL = 1000


class Phases:
    """Open phases, the outermost first; a phase divides the current step of the one around it."""

    def __init__(self) -> None:
        self._open: list[list] = []  # [name, steps done, steps]
        self.reached = 0

    def start(self, name: str, steps: int) -> None:
        """A phase begins within the last one."""
        self._open.append([name, 0, max(steps, 1)])

    def step(self, name: str, done: int) -> None:
        """`done` steps of a phase are over."""
        for phase in self._open:
            if phase[0] == name:
                phase[1] = min(done, phase[2])

    def finish(self, name: str) -> None:
        """A phase ends, and with it those within."""
        names = [phase[0] for phase in self._open]
        if name in names:
            del self._open[names.index(name) :]

    def advance(self) -> bool:
        """Whether `reached`, in thousandths of the whole, has grown."""
        fraction = 0.0
        for _, done, steps in reversed(self._open):
            fraction = min((done + fraction) / steps, 1.0)
        reached = int(fraction * _TOTAL)
        is_further = reached > self.reached
        self.reached = max(reached, self.reached)
        return is_further


def make_monitor(trt: ModuleType, progress: Progress) -> Any:
    """An IProgressMonitor that calls `progress(done, total)`.

    What `progress` raises, Ctrl-C included, must not pass through TensorRT, which would end the process:
    it waits in `raised`, and the build is told to stop.
    """

    base: Any = trt.IProgressMonitor

    class Monitor(base):
        def __init__(self) -> None:
            base.__init__(self)
            self.phases = Phases()
            self.raised: BaseException | None = None

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.phases.start(phase, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            try:
                self.phases.step(phase, step + 1)
                if self.raised is None and self.phases.advance():
                    progress(self.phases.reached, _TOTAL)
            except BaseException as error:
                self.raised = error
            return self.raised is None

        def phase_finish(self, phase: str) -> None:
            self.phases.finish(phase)

    return Monitor()
