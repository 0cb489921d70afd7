"""A conversation outlives a bad line; its prompt edits, remembers and takes commands."""

import io
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.interrupts import Terminated
from uhd_export.runtime.settings import Sampling
from uhd_export.runtime.terminal import chat as chats
from uhd_export.runtime.terminal import questions
from uhd_export.runtime.terminal.questions import PromptQuestions, Questions, StdinQuestions, open_questions


class Answer:
    """As a pipeline gives it: what is asked, said back in pieces."""

    finish_reason = "stop"

    def __init__(self, says):
        self._says = says

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __iter__(self):
        return self

    def __next__(self):
        if not self._says:
            raise StopIteration
        piece = self._says.pop(0)
        if isinstance(piece, BaseException):
            raise piece
        return piece


class Conversation:
    def __init__(self, answers):
        self.answers = answers

    def ask(self, question, *, max_new_tokens, sampling):
        said = self.answers.get(question, [f"about {question}"])
        if isinstance(said, Exception):
            raise said
        return Answer(list(said))


class Lines(Questions):
    def __init__(self, lines, interactive):
        self._lines, self.interactive = list(lines), interactive

    def read(self):
        return self._lines.pop(0) if self._lines else None


@pytest.fixture
def talk(monkeypatch, capsys):
    """`talk(lines)`: what is printed, what is told on stderr, and how many conversations there were."""

    def run(lines, interactive=True, answers=None):
        capsys.readouterr()
        begun = []
        pipeline = SimpleNamespace(
            converse=lambda images: begun.append(images) or Conversation(answers or {})
        )
        monkeypatch.setattr(chats, "open_questions", lambda: Lines(lines, interactive))
        chats.chat(pipeline, ["first"], tokens=9, sampling=Sampling())
        said = capsys.readouterr()
        return said.out.splitlines(), said.err.splitlines(), begun

    return run


def test_a_bad_line_is_told_and_the_next_follows(talk):
    answers = {"bad": UhdError("prompt: too long"), "memory": MemoryError(), "late": ["so", UhdError("gone")]}
    out, told, _ = talk(["bad", "one", "memory", "late", "two"], answers=answers)
    assert out == ["about one", "soabout two"]
    assert [line.partition(";")[0] for line in told[1:]] == [
        "error: prompt: too long",
        "error: not enough memory",
        "error: gone",
    ]


def test_questions_from_elsewhere_tell_at_the_end(talk):
    with pytest.raises(UhdError, match="1 of 2 were not answered"):
        talk(["bad", "one"], interactive=False, answers={"bad": UhdError("no")})
    out, told, _ = talk(["one"], interactive=False)
    assert (out, told) == (["about one"], [])


def test_a_defect_is_not_hidden(talk):
    with pytest.raises(ZeroDivisionError):
        talk(["bad"], answers={"bad": ZeroDivisionError()})


def test_ctrl_c_ends_the_answer_alone(talk):
    answers = {"long": ["once upon", KeyboardInterrupt()]}
    out, told, _ = talk(["long", "two"], answers=answers)
    assert out == ["once upon", "about two"] and "(stopped)" in told
    with pytest.raises(KeyboardInterrupt):
        talk(["long", "two"], interactive=False, answers=answers)
    with pytest.raises(Terminated):
        talk(["long"], answers={"long": ["x", Terminated()]})


def test_commands(talk, image_file):
    out, told, begun = talk(
        ["/help", "one", "/clear", f"/image {image_file}", "/image", "/image no.png", "/hep"]
    )
    assert out == ["about one"] and "/clear" in " ".join(told)
    assert [images[0] == "first" for images in begun] == [True, True, False]
    assert told[-3].startswith("error: /image: which?") and "no.png: no such file" in told[-2]
    assert told[-1] == "error: /hep: no such command; /help lists them"


def test_nothing_raw_reaches_the_terminal(talk):
    out, _, _ = talk(["a"], answers={"a": ["\x1b]0;", "owned\x07\n", "é\t漢"]})
    assert out == ["\\x1b]0;owned\\x07", "é\t漢"]


def test_lines_of_stdin(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\n\n  \ncaf\xe9\r\nlast")))
    assert list(StdinQuestions()) == ["one", "caf\udce9", "last"]


@contextmanager
def keys():
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        yield pipe


LEFT, META_ENTER, CTRL_C, CTRL_D = "\x1b[D", "\x1b\r", "\x03", "\x04"


def test_the_prompt_edits_remembers_and_takes_several_lines(monkeypatch, capsys):
    monkeypatch.setattr(questions, "create_output", lambda stdout: DummyOutput(), raising=False)
    with keys() as pipe:
        prompt = PromptQuestions()
        pipe.send_text(f"on{LEFT}w\rone{META_ENTER}two\rhalf{CTRL_C}whole\r\r{CTRL_D}")
        assert list(prompt) == ["own", "one\ntwo", "whole"]
        # Read in the background where a prompt begins, so that a key of this test may come before it.
        assert prompt._session.history.get_strings() == ["own", "one\ntwo", "whole"]
    assert "Ctrl-D ends the conversation" in capsys.readouterr().err


def test_sigterm_ends_a_prompt_that_waits(monkeypatch):
    with keys():
        prompt = PromptQuestions()
        happens = iter([KeyboardInterrupt, Terminated, EOFError])

        def wait():
            raise next(happens)

        monkeypatch.setattr(prompt._session, "prompt", wait)
        with pytest.raises(Terminated):
            prompt.read()


def test_a_closed_stdin_is_told(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UhdError, match="stdin is closed; give QUESTION"):
        open_questions()
