import json

import numpy as np
import pytest
from support.trace_processor import query

from uhd_export.runtime.profiling.profiler import ProfileOptions
from uhd_export.runtime.profiling.runs import Run, Span
from uhd_export.runtime.profiling.trace import trace_events, write_trace


def check_chrome_format(trace):
    """What Perfetto's importer of JSON asks of complete and metadata events."""
    assert isinstance(trace["traceEvents"], list) and trace["displayTimeUnit"] in ("ms", "ns")
    named = set()
    for event in trace["traceEvents"]:
        assert event["ph"] in ("X", "M") and type(event["pid"]) is type(event["tid"]) is int
        assert isinstance(event["name"], str) and isinstance(event["ts"], int | float)
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name") and isinstance(event["args"]["name"], str)
            named.add(event["tid"])
        else:
            assert event["dur"] >= 0 and event["tid"] in named
    for row in named:  # spans of a row lie inside each other or apart, else Perfetto drops them
        open_until = []
        events = [e for e in trace["traceEvents"] if e["ph"] == "X" and e["tid"] == row]
        for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
            while open_until and open_until[-1] <= event["ts"] + 1:
                open_until.pop()
            assert not open_until or event["ts"] + event["dur"] <= open_until[-1] + 1, event
            open_until.append(event["ts"] + event["dur"])


@pytest.fixture(scope="module")
def trace_file(pipeline, tmp_path_factory):
    """A trace of a real answer of two tokens."""
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    options = ProfileOptions((200, 200), ("fix",), repeats=1, tokens=2, device="cpu", threads=1)
    write_trace(pipeline, options, path)
    return path


def test_where_no_device_is_named_it_is_the_backends(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("uhd_export.runtime.profiling.trace.default_device", lambda backend: "cuda")
    write_trace(pipeline, ProfileOptions((200, 200), ("fix",), repeats=1, tokens=1), tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text())["otherData"]["device"] == "cuda"


SPANS = """
SELECT category AS cat, ts / 1000.0 AS ts, dur / 1000.0 AS dur, slice.name, thread.name AS row,
       process.name AS process
FROM slice JOIN thread_track ON track_id = thread_track.id JOIN thread USING (utid) JOIN process USING (upid)
"""


def test_perfettos_own_parser_opens_it(trace_file):
    seen = query(trace_file, SPANS)
    events = json.loads(trace_file.read_text())["traceEvents"]
    rows = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    written = [{**e, "row": rows[e["tid"]]} for e in events if e["ph"] == "X"]
    assert len(written) > 100 and {span["process"] for span in seen} == {"uhd-export"}
    for fields in (("row", "name", "cat"), ("ts",), ("dur",)):
        ours, theirs = (sorted([span[f] for f in fields] for span in spans) for spans in (written, seen))
        assert ours == (theirs if "name" in fields else pytest.approx(np.array(theirs), abs=0.002)), fields
    assert query(trace_file, "SELECT name, value FROM stats WHERE severity = 'error' AND value > 0") == []


def test_a_real_answer_on_one_time_line(trace_file):
    trace = json.loads(trace_file.read_text())
    check_chrome_format(trace)
    spans = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    stages = [e for e in spans if e["tid"] == 1]
    assert [e["cat"] for e in stages if e["cat"] != "sampling"] == [
        "pixels",
        "vision",
        "prefill",
        "decode",
        "decode",
    ]
    assert sum(e["cat"] == "sampling" for e in stages) == 3
    assert stages[0]["ts"] == 0
    for row, part in ((2, ("vision",)), (3, ("prefill", "decode"))):
        inside = [e for e in stages if e["cat"] in part]
        nodes = [e for e in spans if e["tid"] == row]
        assert len(nodes) > 20 * len(inside)
        for node in nodes:  # each under the stage that ran it
            assert any(e["ts"] - 50 <= node["ts"] <= e["ts"] + e["dur"] + 50 for e in inside), node
    assert any(e["name"].startswith("vit/") for e in spans)
    assert trace["otherData"]["grid_mode"] == "fix"


def test_nodes_go_under_their_own_run():
    run = Run([Span("vision", 10.0, 10.001), Span("prefill", 10.001, 10.003), Span("decode", 10.003, 10.004)])
    noted = {
        "language": [
            {"cat": "Session", "name": "model_run", "ts": 5, "dur": 1},  # the warm-up's
            {"cat": "Session", "name": "model_run", "ts": 1000, "dur": 1000},
            {"cat": "Node", "name": "a_kernel_time", "ts": 1100, "dur": 10, "args": {"op_name": "MatMul"}},
            {"cat": "Session", "name": "model_run", "ts": 9000, "dur": 500},
            {"cat": "Node", "name": "b_kernel_time", "ts": 9000, "dur": 500},
            {"cat": "Node", "name": "b_fence_before", "ts": 9000, "dur": 500},
        ]
    }
    nodes = {e["name"]: e for e in trace_events(run, noted) if e["ph"] == "X" and e["tid"] == 3}
    assert nodes.keys() == {"a", "b"}
    # The run of 1000 us lies in the middle of the span of 2000 us that begins at 1000.
    assert nodes["a"]["ts"] == pytest.approx(1000 + 500 + 100) and nodes["a"]["cat"] == "MatMul"
    assert nodes["b"]["ts"] == pytest.approx(3000 + 250)
