"""Denormal numbers as zero: in an engine's threads and the caller's share, and nowhere else afterwards."""

import threading

import numpy as np
import onnx_ir as ir
import pytest

from uhd_export.plugins.graph import GraphBuilder
from uhd_export.runtime.engines.denormals import SUPPORTED, denormals_as_zero
from uhd_export.runtime.engines.onnxruntime import OrtEngine

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="set on x86-64 under Linux alone")
# Enough for a share of every thread.
COUNT = 1 << 20


def small():
    """A product that only a denormal number can hold, as NumPy computes it in this thread."""
    return (np.full(4, 1e-30, np.float32) * np.full(4, 1e-10, np.float32))[0]


def test_the_setting_is_of_the_block():
    assert small() != 0
    with denormals_as_zero():
        assert small() == 0
    assert small() != 0
    with pytest.raises(KeyError), denormals_as_zero():
        raise KeyError
    assert small() != 0


@pytest.fixture
def engine(tmp_path):
    b = GraphBuilder("product")
    x, y = (b.input(name, ir.DataType.FLOAT, ["n"]) for name in "xy")
    b.output(b.op("Mul", x, y), "product")
    b.save(tmp_path / "product.onnx")
    with OrtEngine(tmp_path / "product.onnx", threads=2) as engine:
        yield engine


def test_an_engine_computes_so_in_every_thread_and_leaves_the_callers_alone(engine):
    feeds = {"x": np.full(COUNT, 1e-30, np.float32), "y": np.full(COUNT, 1e-10, np.float32)}
    assert small() != 0
    counts = []

    def run():
        counts.append(np.count_nonzero(engine.infer(feeds)["product"]))
        counts.append(np.count_nonzero(small()))

    for call in (run, run, lambda: _in_a_thread(run)):
        call()
    assert counts == [0, 1] * 3


def _in_a_thread(run):
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
