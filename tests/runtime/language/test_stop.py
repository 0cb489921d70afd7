"""A running call of an engine ends at once: by Ctrl-C in the main thread, by whoever closes the answer."""

import os
import signal
import threading
import time

import numpy as np
import pytest
from onnx import TensorProto, helper, save

from uhd_export.runtime import Pipeline
from uhd_export.runtime.engines.backends import open_engine
from uhd_export.runtime.engines.base import Stop, Stopped
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.language.decoder import check_finite

STEPS, SIZE = 3000, 300


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """A graph of many products, some ten seconds in all."""
    path = tmp_path_factory.mktemp("slow") / "slow.onnx"
    nodes = [helper.make_node("MatMul", [f"x{i}", "x0"], [f"x{i + 1}"]) for i in range(STEPS)]
    value = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [SIZE, SIZE]) for name in ("x0", f"x{STEPS}")
    ]
    graph = helper.make_graph(nodes, "slow", value[:1], value[1:])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    with open_engine(path, threads=1) as engine:
        yield engine


def feeds():
    return {"x0": np.eye(SIZE, dtype=np.float32)}


def after(seconds, action):
    thread = threading.Timer(seconds, action)
    thread.start()
    return thread


def test_ctrl_c_ends_a_running_call(slow):
    began = []

    def interrupt():
        began.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    after(0.3, interrupt)
    with pytest.raises(KeyboardInterrupt):
        slow.infer(feeds())
    assert time.monotonic() - began[0] < 0.5


def test_another_thread_ends_a_running_call(slow):
    stop = Stop()
    after(0.2, stop.request)
    start = time.monotonic()
    with pytest.raises(Stopped):
        slow.infer(feeds(), stop)
    assert time.monotonic() - start < 0.7


def test_errors_come_back_from_the_helper(slow):
    with pytest.raises(UhdError, match="ONNX Runtime cannot run it"):
        slow.infer({"x0": np.eye(3, dtype=np.float32)})


def test_an_answer_closed_by_another_thread_ends(golden_bundle, image_file):
    with Pipeline.open(golden_bundle, threads=1) as pipeline:
        answer = pipeline.generate(image_file, "w400", max_new_tokens=10_000)
        after(0.3, answer.close)
        start = time.monotonic()
        list(answer)
        assert time.monotonic() - start < 2 and answer.finish_reason is None
        # What was cut off left the cache as it should be.
        first = pipeline.answer(image_file, "w401", max_new_tokens=4)
        pipeline.forget()
        assert pipeline.answer(image_file, "w401", max_new_tokens=4) == first


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_are_an_error(bad):
    logits = np.zeros(5, np.float32)
    assert check_finite(logits) is logits
    logits[3] = bad
    with pytest.raises(UhdError, match="not finite numbers"):
        check_finite(logits)
