"""One pipeline, several threads; what a closed pipeline says; what an answer tells of itself."""

import inspect
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from golden import recipe

import uhd_export.runtime
from uhd_export.runtime import Answer, Conversation, Pipeline, UhdError

SMALL, OTHER = recipe.image(500, 120, 5), recipe.image(300, 120, 2)


def in_threads(*functions):
    """Run all at once; what each returned or raised."""
    results, start = {}, threading.Barrier(len(functions))

    def run(index, function):
        start.wait()
        try:
            results[index] = function()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [results.get(index, "never ended") for index in range(len(functions))]


def test_every_thread_gets_its_own_answer(pipeline):
    def ask(image, question):
        return lambda: pipeline.answer(image, question, max_new_tokens=6)

    jobs = [ask(SMALL, "A"), ask(OTHER, "B"), ask(SMALL, "Why?")]
    alone = [job() for job in jobs]
    assert len(set(alone)) > 1
    for _ in range(3):
        assert in_threads(*jobs) == alone


def test_an_unfinished_answer_keeps_others_waiting_until_it_is_closed(pipeline):
    whole = pipeline.answer(SMALL, "A", max_new_tokens=8)
    answer = pipeline.generate(SMALL, "A", max_new_tokens=8)
    next(answer)
    done = threading.Event()
    logits = []
    other = threading.Thread(target=lambda: (logits.append(pipeline.logits(OTHER, [1, -200])), done.set()))
    other.start()
    assert not done.wait(0.3)
    assert "".join(answer) and answer.text == whole
    assert done.wait(60)
    closed = pipeline.generate(SMALL, "A", max_new_tokens=8)
    next(closed)
    closed.close()
    assert list(closed) == [] and closed.finish_reason is None
    (again,) = in_threads(lambda: pipeline.logits(OTHER, [1, -200]))
    np.testing.assert_array_equal(again, logits[0])


@pytest.mark.parametrize("call", ["logits", "forget"])
def test_a_thread_that_asks_anew_ends_its_own_answer(pipeline, call):
    answer = pipeline.generate(SMALL, "A", max_new_tokens=60)
    next(answer)
    pipeline.forget() if call == "forget" else pipeline.logits(OTHER, [1, -200])
    with pytest.raises(UhdError, match="another prompt was run"):
        next(answer)


def test_what_does_not_touch_the_cache_ends_no_answer(pipeline):
    whole = pipeline.answer(SMALL, "A", max_new_tokens=8)
    answer = pipeline.generate(SMALL, "A", max_new_tokens=8)
    next(answer)
    pipeline.encode_image(OTHER)
    pipeline.configure(max_slices=9)
    pipeline.inputs_embeds(OTHER, [1, -200])
    list(answer)
    assert answer.text == whole


def test_threads_share_a_conversation(pipeline):
    conversation = pipeline.converse(SMALL)
    for result in in_threads(*[lambda: "".join(conversation.ask("A", max_new_tokens=3))] * 3):
        assert isinstance(result, (str, UhdError))
    assert "".join(conversation.ask("B", max_new_tokens=3)) is not None


def test_an_answer_tells_of_itself(pipeline):
    pipeline.forget()
    answer = pipeline.generate(SMALL, "A", max_new_tokens=3)
    assert isinstance(answer, Answer) and answer.finish_reason is None and answer.text == ""
    text = "".join(answer)
    assert answer.text == text and answer.finish_reason in ("length", "stop")
    assert answer.generated_tokens == 3 or answer.finish_reason == "stop"
    assert answer.cached_tokens == 0 and answer.prompt_tokens > 144
    assert set(answer.seconds) == {"image", "vision", "prefill", "decode"}
    assert all(seconds > 0 for seconds in answer.seconds.values())
    again = pipeline.generate(SMALL, "A", max_new_tokens=3)
    assert "".join(again) == text
    assert again.cached_tokens == answer.prompt_tokens - 1 and again.seconds["vision"] == 0


def test_a_full_context_is_the_reason(golden_bundle):
    with Pipeline.open(golden_bundle, threads=1, context=330) as small:
        answer = small.generate(SMALL, "A", max_new_tokens=500)
        list(answer)
        assert answer.finish_reason == "context"
        assert answer.prompt_tokens + answer.generated_tokens == 331


def test_a_closed_pipeline_says_so(golden_bundle):
    pipeline = Pipeline.open(golden_bundle, threads=1)
    conversation, unread = pipeline.converse(SMALL), pipeline.generate(SMALL, "A")
    begun = pipeline.generate(SMALL, "A", max_new_tokens=60)
    next(begun)
    pipeline.close()
    pipeline.close()
    for call in (
        lambda: next(begun),
        lambda: next(unread),
        lambda: conversation.ask("A"),
        lambda: pipeline.generate(SMALL, "A"),
        lambda: pipeline.answer(SMALL, "A"),
        lambda: pipeline.generate_ids(SMALL, [1, -200], 3),
        lambda: pipeline.logits(SMALL, [1, -200]),
        lambda: pipeline.inputs_embeds(SMALL, [1, -200]),
        lambda: pipeline.encode_image(SMALL),
        lambda: pipeline.plan_image(SMALL),
        lambda: pipeline.input_ids("A"),
        lambda: pipeline.converse(SMALL),
        lambda: pipeline.configure(max_slices=1),
        pipeline.forget,
        pipeline.__enter__,
    ):
        with pytest.raises(UhdError, match="closed"):
            call()
    assert "closed" in repr(pipeline)


def test_an_answer_that_waits_for_its_turn_can_be_closed(pipeline):
    begun, waiting = (pipeline.generate(SMALL, question, max_new_tokens=60) for question in "AB")
    next(begun)
    got = []
    other = threading.Thread(target=lambda: got.append(list(waiting)), daemon=True)
    other.start()
    time.sleep(0.3)
    closing = threading.Thread(target=waiting.close, daemon=True)
    closing.start()
    closing.join(10)
    other.join(10)
    assert not closing.is_alive() and got == [[]]
    assert next(begun)  # keeps its turn
    begun.close()
    assert pipeline.answer(SMALL, "B", max_new_tokens=4)


def test_closing_ends_those_who_wait(golden_bundle):
    pipeline = Pipeline.open(golden_bundle, threads=1)
    begun = pipeline.generate(SMALL, "A", max_new_tokens=60)
    next(begun)
    waiting = threading.Event()

    def close():
        waiting.wait(10)
        pipeline.close()

    def ask():
        waiting.set()
        return pipeline.answer(SMALL, "B")

    error, closed = in_threads(ask, close)
    assert isinstance(error, UhdError) and closed is None


def test_reprs_tell_what_things_are(pipeline):
    assert "onnxruntime" in repr(pipeline) and "context" in repr(pipeline)
    assert "1 images" in repr(pipeline.converse(SMALL))
    assert "unfinished" in repr(pipeline.generate(SMALL, "A"))
    assert "500x120" in repr(pipeline.plan_image(SMALL))
    assert "positions" in repr(pipeline.sequence(SMALL, [1, -200]))
    assert "pixels" in repr(pipeline.vision)
    for function in (Pipeline.open, Pipeline.configure, Pipeline.generate, Conversation.ask):
        assert " object at 0x" not in str(inspect.signature(function))


def test_the_public_surface():
    names = {"Answer", "Conversation", "Pipeline", "Sampling", "UhdError", "plan_slices"}
    assert set(uhd_export.runtime.__all__) == names == set(dir(uhd_export.runtime))
    assert all(getattr(uhd_export.runtime, name).__name__ == name for name in names)
    with pytest.raises(AttributeError, match="nothing"):
        uhd_export.runtime.nothing  # noqa: B018


def test_planning_alone_needs_no_backend():
    code = (
        "import sys; from uhd_export.runtime import plan_slices; plan_slices((1008, 672)); "
        "print({'onnxruntime', 'tokenizers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
