"""Weights lie on large pages, and leave with their engine."""

import functools
import json
import subprocess
import sys

import numpy as np
import onnx_ir as ir
import pytest

from uhd_export.plugins.graph import GraphBuilder
from uhd_export.runtime.engines.large_pages import large_page_size

_WIDTH, _LAYERS = 2048, 8
_WEIGHTS = 4 * _WIDTH**2 * _LAYERS
# In a process of its own: what another test left on the heap would be counted.
_SCRIPT = """
import json, sys, threading
from uhd_export.runtime.engines.onnxruntime import OrtEngine

def memory():
    with open("/proc/self/smaps_rollup") as file:
        lines = dict(line.split(":", 1) for line in file.read().splitlines()[1:])
    return [1024 * int(lines[name].split()[0]) for name in ("Rss", "AnonHugePages")]

def look():
    before = memory()
    engine = OrtEngine(sys.argv[1], threads=1)
    opened = memory()
    engine.close()
    print(json.dumps([before, opened, memory()]))

look()
thread = threading.Thread(target=look)
thread.start()
thread.join()
"""


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    """(resident, on large pages) before, with and after an engine; of the main thread, then of another."""
    path = tmp_path_factory.mktemp("large") / "large.onnx"
    builder = GraphBuilder("large")
    x = builder.input("x", ir.DataType.FLOAT, ("size", _WIDTH))
    square = (_WIDTH, _WIDTH)
    for layer in range(_LAYERS):  # equal weights would be stored once
        fill = functools.partial(np.full, square, layer, np.float32)
        x = builder.op("MatMul", x, builder.weight(f"w{layer}", square, ir.DataType.FLOAT, fill))
    builder.output(x, "y", ir.DataType.FLOAT, ("size", _WIDTH))
    builder.save(path)
    command = [sys.executable, "-P", "-c", _SCRIPT, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.skipif(large_page_size() is None, reason="this system gives no large pages")
def test_weights_lie_on_large_pages(memory):
    (before, opened, _), _ = memory
    assert opened[1] - before[1] > 0.9 * _WEIGHTS


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_they_take_no_more_and_are_given_back(memory):
    for before, opened, closed in memory:
        assert _WEIGHTS < opened[0] - before[0] < 1.1 * _WEIGHTS
        assert opened[0] - closed[0] > 0.95 * _WEIGHTS
