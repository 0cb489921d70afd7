"""Questions to come: from a terminal, with a prompt that edits and remembers, or line by line."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator

from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.interrupts import Terminated


class Questions(ABC):
    """Lines, until there are no more; empty ones are left out."""

    interactive = False
    """Whether somebody sits at a terminal."""

    @abstractmethod
    def read(self) -> str | None:
        """The next line, waiting for it; None at the end."""

    def __iter__(self) -> Iterator[str]:
        while (line := self.read()) is not None:
            if line.strip():
                yield line


class StdinQuestions(Questions):
    """Lines of stdin. Bytes that are no UTF-8 stay recognisable, so that what asks can refuse them."""

    def read(self) -> str | None:
        """See `Questions.read`."""
        line = sys.stdin.buffer.readline()
        return line.decode(errors="surrogateescape").strip() if line else None


class PromptQuestions(Questions):
    """A prompt on stderr: history, editing, several lines; so that stdout has the answers alone."""

    interactive = True

    def __init__(self) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
        from prompt_toolkit.output import create_output

        keys = KeyBindings()

        @keys.add("enter")
        def _ask(event: KeyPressEvent) -> None:
            event.current_buffer.validate_and_handle()

        @keys.add("escape", "enter")
        def _new_line(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        self._session: PromptSession[str] = PromptSession(
            "> ",
            multiline=True,
            prompt_continuation="  ",
            key_bindings=keys,
            reserve_space_for_menu=0,
            output=create_output(stdout=sys.stderr),
        )

    def read(self) -> str | None:
        """See `Questions.read`. Ctrl-C leaves the line, Ctrl-D ends, and so does SIGTERM."""
        while True:
            try:
                return self._session.prompt()
            except Terminated:
                raise
            except KeyboardInterrupt:
                print("(Ctrl-D ends the conversation)", file=sys.stderr, flush=True)
            except EOFError:
                return None


def open_questions() -> Questions:
    """The prompt where somebody sits at a terminal, else the lines of stdin. Raises UhdError without one."""
    if sys.stdin is None:
        raise UhdError("no question, and stdin is closed; give QUESTION")
    return PromptQuestions() if sys.stdin.isatty() and sys.stderr.isatty() else StdinQuestions()
