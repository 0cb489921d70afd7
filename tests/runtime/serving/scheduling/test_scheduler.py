"""Continuous batching: an answer among others equals the answer alone, token for token."""

import threading
import time
from itertools import pairwise

import pytest
from golden import recipe

from uhd_export.runtime import Pipeline
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.language.decoder import ENOUGH_POSITIONS
from uhd_export.runtime.serving.dialogue import Message
from uhd_export.runtime.serving.sampling.choice import Choosing
from uhd_export.runtime.serving.scheduling.queue import Busy
from uhd_export.runtime.serving.scheduling.scheduler import Closed, Limits
from uhd_export.runtime.settings import Sampling


def tokens(stream) -> list[int]:
    return [chosen.token for piece in stream for chosen in piece.tokens]


@pytest.mark.slow
def test_answers_together_equal_answers_alone(serve, ask, cards, nano_bundle):
    with Pipeline.open(nano_bundle, context=2048) as pipeline:
        alone = ["".join(pipeline.generate(i, q, max_new_tokens=24)) for i, q, _ in cards]
    service = serve(slots=3, limits=Limits(chunk=100, lone_chunk=333))
    streams = [ask(service, image, question, max_tokens=24) for image, question, _ in cards]
    assert [stream.text() for stream in streams] == alone
    assert [text.strip() for text in alone][:2] == [code for *_, code in cards][:2]
    assert {stream.summary.reason for stream in streams} == {"stop"}


@pytest.mark.slow
def test_golden_answers_together_equal_the_pipeline_s(serve, golden_bundle):
    images = [recipe.image(500, 120, 5), recipe.image(1008, 672, 0), recipe.image(336, 336, 3)]
    questions = ["what is this", "and now for something longer than the others", "why"]
    cases = [(image, question) for image in images for question in questions]
    with Pipeline.open(golden_bundle) as pipeline:
        alone = [
            list(pipeline.generate_ids(image, pipeline_prompt(pipeline, question), 16))
            for image, question in cases
        ]
        context = pipeline.settings.context
    service = serve(golden_bundle, slots=4, context=context, limits=Limits(chunk=64, lone_chunk=200))
    requests = [
        service.prepare([Message("user", ("", f"\n{question}"))], [as_pil(image)], max_tokens=16)
        for image, question in cases
    ]
    streams = [service.submit(request) for request in requests]
    for stream, expected in zip(streams, alone, strict=True):
        got = tokens(stream)
        assert got == [token for token in expected if token not in service.manifest.model.language.eos]
    assert service.scheduler.stepped > 1.5 * service.scheduler.steps  # they did run together


def pipeline_prompt(pipeline, question):
    from uhd_export.runtime.language.prompt import render

    return render(question, pipeline.settings.template)


def as_pil(image):
    from uhd_export.runtime.image.source import open_image

    return open_image(image)


def test_a_second_question_finds_the_slot_and_the_encoded_image(serve, ask, cards):
    service = serve(slots=2)
    image, question, code = cards[0]
    first = ask(service, image, question, max_tokens=8)
    assert first.text().strip() == code and first.summary.cached_tokens == 0
    other = ask(service, cards[1][0], cards[1][1], max_tokens=8)
    assert other.text().strip() == cards[1][2]
    second = ask(service, image, "What is the code on the blue card?", max_tokens=8)
    second.text()
    assert second.summary.cached_tokens > second.summary.prompt_tokens * 0.8
    assert second.summary.cached_images == 1
    assert second.summary.seconds["vision"] == 0


def test_equal_crops_of_different_requests_share_a_run(serve, ask, cards):
    service = serve(slots=4)
    images = [image.resize((336, 336)) for image, *_ in cards]
    streams = [ask(service, image, "What?", max_tokens=2) for image in images]
    for stream in streams:
        stream.text()
    worker = service.scheduler._vision
    assert worker.crops == len(images) and worker.runs < len(images)


def test_running_answers_go_on_while_a_newcomer_is_read(serve, ask):
    """Between two chunks of a newcomer's prompt there is a step of those who run."""
    service = serve(slots=2, limits=Limits(chunk=16, lone_chunk=16))
    events = []
    rows = service.scheduler._rows
    append, step = rows._append, rows._step  # whatever is asked of a run
    rows._append = lambda row, *rest: (events.append(("chunk", row)), append(row, *rest))[1]
    rows._step = lambda chosen, *rest: (events.append(("step", tuple(chosen))), step(chosen, *rest))[1]
    bias = Choosing(logit_bias={service.manifest.model.language.eos[0]: -100})
    running = ask(service, None, "Count.", max_tokens=1500, choosing=bias)
    next(iter(running))
    reader = threading.Thread(target=running.text)
    reader.start()
    newcomer = ask(service, None, "Read this. " * 150, max_tokens=8)
    newcomer.text()
    row = next(row for kind, row in reversed(events) if kind == "chunk")
    running.cancel()
    reader.join()
    chunks = [i for i, event in enumerate(events) if event == ("chunk", row)]
    between = [any(kind == "step" for kind, _ in events[a:b]) for a, b in pairwise(chunks)]
    assert len(between) > 20 and all(between)


def test_a_prompt_alone_runs_in_pieces_as_long_as_suit_the_processor(serve, ask):
    service = serve(slots=1)
    rows, sizes = service.scheduler._rows, []
    append = rows._append
    rows._append = lambda row, embeds, *rest: (sizes.append(len(embeds)), append(row, embeds, *rest))[1]
    ask(service, None, "Read this. " * 150, max_tokens=1).text()
    assert max(sizes) == ENOUGH_POSITIONS and sum(sizes) > 3 * ENOUGH_POSITIONS


def test_a_prompts_activations_are_returned_after_its_last_chunk(serve, ask, monkeypatch):
    service = serve(slots=1)
    language, events = service.scheduler._language, []
    rows, append = service.scheduler._rows, service.scheduler._rows._append
    monkeypatch.setattr(language, "trim", lambda: events.append("trim"))
    rows._append = lambda *given: (events.append("run"), append(*given))[1]
    ask(service, None, "Read this. " * 100, max_tokens=1).text()
    assert events.count("run") > 1 and events.index("trim") == len(events) - 1


@pytest.mark.parametrize(
    ("asked", "bound", "alone", "between"),
    [(None, None, 1024, 256), (None, 64, 64, 64), (600, 64, 600, 256), (100, None, 100, 100)],
)
def test_what_is_asked_for_goes_before_what_memory_bounds(asked, bound, alone, between):
    limits = Limits(lone_chunk=asked).bounded(bound)
    assert (limits.lone_chunk, limits.chunk) == (alone, between)


def test_callers_take_turns_and_the_line_has_a_limit(serve, ask):
    service = serve(slots=1, limits=Limits(waiting=6))
    endless = Choosing(logit_bias={token: -100 for token in service.manifest.model.language.eos})
    running = ask(service, None, "Go.", choosing=endless)
    next(iter(running))
    order = []

    def follow(name, stream):
        stream.text()
        order.append(name)

    callers = ["a", "a", "a", "b", "a", "c"]
    streams = [ask(service, None, "Hi.", max_tokens=40, choosing=endless, caller=name) for name in callers]
    with pytest.raises(Busy) as busy:
        ask(service, None, "Hi.", caller="d")
    assert busy.value.retry_after >= 1
    threads = [
        threading.Thread(target=follow, args=(name, stream))
        for name, stream in zip(callers, streams, strict=True)
    ]
    for thread in threads:
        thread.start()
    running.cancel()
    for thread in threads:
        thread.join()
    # One of a's was taken ahead before the others came; from then on each caller has a turn.
    assert sorted(order) == sorted(callers)
    assert order[:4].count("a") <= 2 and {"b", "c"} <= set(order[:4])


def test_cut_images_of_all_requests_have_a_limit(serve, ask, cards):
    """A request alone may be larger than it: nothing else would ever answer it."""
    service = serve(slots=2, limits=Limits(crop_bytes=1000))
    endless = Choosing(logit_bias={token: -100 for token in service.manifest.model.language.eos})
    stream = ask(service, cards[0][0], "What?", choosing=endless)
    next(iter(stream))
    with pytest.raises(Busy):
        ask(service, cards[1][0], "What?")
    assert ask(service, None, "Hi.", max_tokens=1).text() is not None
    stream.cancel()
    assert wait_idle(service) < 5
    assert ask(service, cards[1][0], "What?", max_tokens=1).text() is not None


def test_cancellation_deadline_and_close_free_the_slot(serve, ask):
    service = serve(slots=1, context=512)
    endless = Choosing(logit_bias={token: -100 for token in service.manifest.model.language.eos})
    stream = ask(service, None, "Go.", choosing=endless)
    next(iter(stream))
    start = time.monotonic()
    stream.cancel()
    stream.text()
    assert stream.summary.reason == "cancelled" and time.monotonic() - start < 0.5
    waiting = wait_idle(service)
    assert waiting < 0.5
    late = ask(service, None, "Go.", choosing=endless, seconds=0.0)
    late.text()
    assert late.summary.reason == "deadline"
    full = ask(service, None, "Go.", choosing=endless)
    full.text()
    assert full.summary.reason == "context"
    assert full.summary.prompt_tokens + full.summary.completion_tokens == 512 + 1
    last = ask(service, None, "Go.", choosing=endless)
    service.close()
    last.text()
    assert last.summary.reason in ("closed", "context")
    with pytest.raises(Closed):
        ask(service, None, "Hi.")


@pytest.mark.parametrize("seconds", [1e10, float("inf")])
def test_a_deadline_may_be_further_than_a_thread_can_wait(serve, ask, cards, seconds):
    service = serve(slots=1)
    assert ask(service, cards[0][0], "What?", max_tokens=1, seconds=seconds).text() is not None
    assert service.scheduler.alive


def test_a_deadline_is_a_number(serve, ask):
    with pytest.raises(UhdError, match="seconds: nan"):
        ask(serve(slots=1), None, "What?", seconds=float("nan"))


def wait_idle(service) -> float:
    start = time.monotonic()
    while service.scheduler.busy_slots and time.monotonic() - start < 5:
        time.sleep(0.005)
    return time.monotonic() - start


def test_a_slow_reader_stops_its_own_answer_only(serve, ask):
    service = serve(slots=2, limits=Limits(patience=0.3))
    endless = Choosing(logit_bias={token: -100 for token in service.manifest.model.language.eos})
    slow = ask(service, None, "Go.", choosing=endless)
    quick = ask(service, None, "Go.", choosing=endless, max_tokens=300)
    assert quick.text() and quick.summary.reason == "length"
    deadline = time.monotonic() + 5
    while not slow.ended and time.monotonic() < deadline:
        assert slow.pending <= 64
        time.sleep(0.01)
    assert slow.summary.reason == "slow" and slow.pending <= 64


def test_seeds_repeat_whoever_runs_beside(serve, ask):
    service = serve(slots=3)
    warm = Choosing(Sampling(temperature=1.5, top_k=50, seed=7))
    other = Choosing(Sampling(temperature=1.0, seed=8))
    alone = ask(service, None, "Tell me.", max_tokens=20, choosing=warm).text()
    streams = [ask(service, None, "Tell me.", max_tokens=20, choosing=c) for c in (other, warm, other)]
    texts = [stream.text() for stream in streams]
    assert texts[1] == alone and texts[0] == texts[2] != alone
