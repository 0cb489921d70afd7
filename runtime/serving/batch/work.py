"""Many pairs answered with all slots busy."""

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeVar

from uhd_export.runtime.errors import UhdError, explain
from uhd_export.runtime.image.source import open_image
from uhd_export.runtime.language.pairs import Pair
from uhd_export.runtime.language.prompt import IMAGE
from uhd_export.runtime.serving.dialogue import Message
from uhd_export.runtime.serving.sampling.choice import Choosing
from uhd_export.runtime.serving.scheduling.queue import Busy
from uhd_export.runtime.serving.scheduling.request import AnswerStream, Request, Summary
from uhd_export.runtime.serving.service import Service

T = TypeVar("T")
R = TypeVar("R")
_ENDED = ("stop", "length", "context")


@dataclass(frozen=True)
class Answered:
    """The answer to one question."""

    text: str
    summary: Summary


class Failed(Exception):
    """A question was not answered; the message is one line."""


def answer_pair(
    service: Service,
    pair: Pair,
    *,
    max_tokens: int | None,
    choosing: Choosing | None = None,
    given: bool = False,
) -> list[Answered]:
    """An answer to each turn of `pair`; the history is our own answers, or with `given` those of the pair.

    Raises Failed.
    """
    messages: list[Message] = []
    answers: list[Answered] = []
    try:
        images = [open_image(image) for image in pair.images]
        markers = any(IMAGE in turn.question for turn in pair.turns)
        for index, turn in enumerate(pair.turns):
            first = index == 0 and not markers
            text = f"{IMAGE}\n" * len(images) + turn.question if first else turn.question
            messages.append(Message("user", tuple(text.split(IMAGE))))
            shown = images[: sum(message.images for message in messages)]
            request = service.prepare(messages, shown, max_tokens=max_tokens, choosing=choosing)
            answered = _answer(service, request)
            answers.append(answered)
            known = turn.answer if given and turn.answer is not None else answered.text
            messages.append(Message("assistant", (known,)))
    except UhdError as error:
        raise Failed(explain(error) or str(error)) from None
    return answers


def _answer(service: Service, request: Request) -> Answered:
    stream = _submit(service, request)
    text = stream.text()
    if stream.summary.reason not in _ENDED:
        raise Failed(f"the answer ended early ({stream.summary.reason})")
    return Answered(text, stream.summary)


def _submit(service: Service, request: Request) -> AnswerStream:
    """Its answer; while the images of those before take what is reserved, it waits."""
    while True:
        try:
            return service.submit(request)
        except Busy:
            time.sleep(0.02)


def all_busy(service: Service, items: Iterable[T], work: Callable[[T], R]) -> Iterator[tuple[T, R | Failed]]:
    """`work` of each item, as it is done: enough at a time to keep every slot busy and the next one ready."""
    ahead = 2 * service.options.slots
    todo = iter(items)
    with ThreadPoolExecutor(ahead, thread_name_prefix="uhd-batch") as pool:
        running: dict[Future[R], T] = {}
        try:
            while True:
                while len(running) < ahead and (item := next(todo, None)) is not None:
                    running[pool.submit(work, item)] = item
                if not running:
                    return
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    item = running.pop(future)
                    try:
                        yield item, future.result()
                    except Failed as failure:
                        yield item, failure
        finally:
            for future in running:
                future.cancel()
            if running:  # left early, by Ctrl-C perhaps: nobody waits for these answers
                service.close()
