"""Answers on the terminal: one question, or a conversation until an empty line."""

import sys
from collections.abc import Iterator
from itertools import chain

from uhd_export.runtime.conversation import Conversation
from uhd_export.runtime.interrupts import Terminated, forget_interrupt
from uhd_export.runtime.pipeline import Pipeline
from uhd_export.runtime.progress import status
from uhd_export.runtime.settings import Sampling

_ENDS = {
    "length": "stopped after {tokens} tokens; --max-new-tokens allows more",
    "context": "stopped because the context is full; lower --max-slices or {remedy}",
}


def answer(
    pipeline: Pipeline, conversation: Conversation, question: str, *, tokens: int, sampling: Sampling
) -> None:
    """Print the answer to `question` as it is generated, and on stderr why it ended early, if it did."""
    reply = conversation.ask(question, max_new_tokens=tokens, sampling=sampling)
    _stream(reply)
    if reply.finish_reason in _ENDS:
        generator = pipeline.generator
        remedy = generator.larger_context(generator.decoder.context + 1)
        print(f"({_ENDS[reply.finish_reason].format(tokens=tokens, remedy=remedy)})", file=sys.stderr)


def chat(pipeline: Pipeline, conversation: Conversation, *, tokens: int, sampling: Sampling) -> None:
    """Read questions from stdin and answer each. An empty line or the end of input ends it.

    Ctrl-C cuts an answer short; between answers it ends the program, as SIGTERM always does.
    """
    interactive = sys.stdin.isatty()
    if interactive:
        print("Ask about the image; an empty line ends.", file=sys.stderr)
    while question := _read(interactive):
        try:
            answer(pipeline, conversation, question, tokens=tokens, sampling=sampling)
        except Terminated:
            raise
        except KeyboardInterrupt:
            forget_interrupt()
            print()


def _read(interactive: bool) -> str:
    if interactive:
        print("> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip()


def _stream(pieces: Iterator[str]) -> None:
    with status("reading"):
        first = next(pieces, "")
    for piece in chain([first], pieces):
        print(piece, end="", flush=True)
    print(flush=True)
