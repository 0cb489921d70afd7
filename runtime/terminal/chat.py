"""Answers on the terminal: one question, or a conversation, which a bad line does not end."""

import sys
from collections.abc import Iterator
from itertools import chain

from uhd_export.runtime.conversation import Conversation
from uhd_export.runtime.errors import UhdError, explain, printable
from uhd_export.runtime.image.source import Images, open_image
from uhd_export.runtime.interrupts import Terminated, forget_interrupt, was_interrupt
from uhd_export.runtime.pipeline import Pipeline
from uhd_export.runtime.progress import status
from uhd_export.runtime.settings import Sampling
from uhd_export.runtime.terminal.questions import Questions, open_questions

_ENDS = {
    "length": "stopped after {tokens} tokens; --max-new-tokens allows more",
    "context": "stopped because the context is full; lower --max-slices or {remedy}",
}
WELCOME = "Ask about the image. /help tells what else there is; Ctrl-D ends."
HELP = """\
/image PATH   go on with another image: a path, an address or a data URI
/clear        forget the questions and answers so far
/help         this
Enter asks, Alt-Enter begins a new line. Ctrl-C ends an answer, Ctrl-D the conversation."""


def answer(
    pipeline: Pipeline, conversation: Conversation, question: str, *, tokens: int, sampling: Sampling
) -> None:
    """Print the answer to `question` as it is generated, and on stderr why it ended early, if it did."""
    with conversation.ask(question, max_new_tokens=tokens, sampling=sampling) as reply:
        _stream(reply)
    if reply.finish_reason in _ENDS:
        generator = pipeline.generator
        remedy = generator.larger_context(generator.decoder.context + 1)
        _tell(f"({_ENDS[reply.finish_reason].format(tokens=tokens, remedy=remedy)})")


def chat(pipeline: Pipeline, images: Images, *, tokens: int, sampling: Sampling) -> None:
    """Read questions, from a terminal or from stdin, and answer each until they end.

    What goes wrong with one is told, and the next may follow. Ctrl-C ends an answer; where nobody sits at a
    terminal it ends the program, as SIGTERM always does. Raises UhdError at the end of questions from
    elsewhere, where one was not answered.
    """
    questions = open_questions()
    chat = _Chat(pipeline, images, questions, tokens, sampling)
    if questions.interactive:
        _tell(WELCOME)
    asked = failed = 0
    for line in questions:
        asked += 1
        try:
            chat.take(line)
        except Terminated:
            raise
        except KeyboardInterrupt:
            chat.interrupted()
        except Exception as error:
            if was_interrupt(error):
                chat.interrupted()
                continue
            reason = explain(error)
            if reason is None:
                raise
            failed += 1
            _tell(f"error: {reason}")
    if failed and not questions.interactive:
        raise UhdError(f"questions: {failed} of {asked} were not answered, as told above")


class _Chat:
    """What lines of a conversation do."""

    def __init__(
        self, pipeline: Pipeline, images: Images, questions: Questions, tokens: int, sampling: Sampling
    ) -> None:
        self._pipeline, self._images, self._questions = pipeline, images, questions
        self._tokens, self._sampling = tokens, sampling
        self._conversation = pipeline.converse(images)

    def take(self, line: str) -> None:
        """Answer a question, or do what a command says. Raises UhdError."""
        command, _, rest = line.strip().partition(" ")
        if command == "/help":
            _tell(HELP)
        elif command == "/clear":
            self._conversation = self._pipeline.converse(self._images)
        elif command == "/image":
            self._change(rest.strip())
        elif self._questions.interactive and command[:1] == "/" and command[1:].isalpha():
            raise UhdError(f"{command}: no such command; /help lists them")
        else:
            answer(self._pipeline, self._conversation, line, tokens=self._tokens, sampling=self._sampling)

    def interrupted(self) -> None:
        """Ctrl-C during an answer. Raises KeyboardInterrupt where no terminal is."""
        if not self._questions.interactive:
            raise KeyboardInterrupt
        forget_interrupt()
        print(flush=True)
        _tell("(stopped)")

    def _change(self, path: str) -> None:
        if not path:
            raise UhdError("/image: which? Give a path, an address or a data URI behind it")
        with status("opening the image"):
            images = [open_image(path)]
            self._conversation = self._pipeline.converse(images)
        self._images = images


def _stream(pieces: Iterator[str]) -> None:
    with status("reading"):
        first = next(pieces, "")
    for piece in chain([first], pieces):
        print(printable(piece), end="", flush=True)
    print(flush=True)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
