"""A cluster of two replicas on this machine: one image stays with one replica, and a dead one is replaced."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from support.requests import about

from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.serving.http.front import HttpOptions

ray = pytest.importorskip("ray")


def open_nano(bundle):
    from uhd_export.runtime.serving.service import Service, ServiceOptions

    return lambda: Service.open(bundle, ServiceOptions(slots=2, context=2048), threads=1)


@pytest.fixture(scope="module")
def cluster():
    """Ray on this machine. It would end its own processes where others' take the memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def command(cluster, nano_bundle):
    """`uhd-export serve --cluster 2` on that cluster: its process, and where it serves."""
    arguments = ["serve", str(nano_bundle), "--cluster", "2", "--port", "0", "--api-key", "secret"]
    options = ["--slots", "2", "--context", "2048", "--threads", "1"]
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    with subprocess.Popen(
        [sys.executable, "-m", "uhd_export", *arguments, *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            line = process.stdout.readline()
            assert "2 replicas of 2 slots" in line, process.stderr.read()
            yield process, line.partition(": ")[0]
        finally:
            process.kill()


@pytest.fixture
def client(command):
    _, address = command
    headers = {"Authorization": "Bearer secret"}
    with httpx.Client(base_url=address, headers=headers, timeout=120) as client:
        yield client


def ask(client, image, question, **fields):
    body = {"messages": about(image, question), "max_tokens": 8, **fields}
    return client.post("/v1/chat/completions", json=body)


def replicas() -> set[int]:
    """Processes of the replicas, by the title that Ray gives them."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if b"ServeReplica:uhd-export:replica" in path.read_bytes():
                found.add(int(path.parent.name))
    return found


@pytest.mark.slow
def test_the_cluster(client, cards):
    image, question, code = cards[0]
    # The same application, its keys and refusals too.
    assert client.get("/v1/models").json()["data"][0]["id"] == "llava-uhd"
    assert client.get("/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert client.post("/v1/chat/completions", json={"messages": []}).status_code == 400
    # One image stays with the replica that has encoded it.
    answers = [ask(client, image, question).json() for _ in range(4)]
    assert {answer["choices"][0]["message"]["content"] for answer in answers} == {code}
    assert [answer["timings"]["images_encoded_before"] for answer in answers] == [0, 1, 1, 1]
    streamed = ask(client, image, question, stream=True)
    assert streamed.headers["content-type"].startswith("text/event-stream") and "[DONE]" in streamed.text
    # A replica that dies is replaced, and every request is answered, elsewhere or with 503.
    pids = replicas()
    assert len(pids) == 2
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        statuses = []
        deadline = time.monotonic() + 90
        while statuses[-3:] != [200] * 3:
            assert time.monotonic() < deadline, statuses
            statuses.append(ask(client, image, question).status_code)
            assert statuses[-1] in (200, 503)
    assert ask(client, image, question).json()["choices"][0]["message"]["content"] == code


@pytest.mark.slow
def test_the_cluster_is_left_as_it_was(command):
    process, _ = command
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0, process.stderr.read()
    assert process.stderr.read() == ""
    wait_for(lambda: not replicas())


def wait_for(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.slow
def test_replicas_come_and_go_with_the_callers(cluster, nano_bundle):
    from uhd_export.runtime.serving.cluster.serve import ClusterOptions, deployed

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ClusterOptions(replicas=1, most=2, slots=1, cpus=0.1, up=1, down=2)
    served = deployed(open_nano(nano_bundle), HttpOptions(), options, port=port)
    with served, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
        assert len(replicas()) == 1
        over = threading.Event()

        def call():
            body = {"messages": [{"role": "user", "content": "Go."}], "logit_bias": {"2": -100}}
            while not over.is_set():
                answer = client.post("/v1/chat/completions", json=body | {"max_tokens": 300})
                assert answer.status_code == 200, answer.text

        callers = [threading.Thread(target=call) for _ in range(4)]
        for caller in callers:
            caller.start()
        try:
            wait_for(lambda: len(replicas()) == 2)
        finally:
            over.set()
            for caller in callers:
                caller.join()
        wait_for(lambda: len(replicas()) == 1)


@pytest.mark.slow
def test_replicas_that_cannot_start_are_one_line(cluster, tmp_path):
    from uhd_export.runtime.serving.cluster.serve import ClusterOptions, deployed

    with pytest.raises(UhdError, match=r"the replicas do not start; .*no manifest.json"):
        deployed(open_nano(tmp_path), HttpOptions(), ClusterOptions(cpus=0.1)).__enter__()


@pytest.mark.slow
def test_a_file_of_questions_over_two_workers(cluster, nano_bundle, cards, tmp_path):
    from uhd_export.runtime.serving.batch.file import BatchOptions, write_answers
    from uhd_export.runtime.serving.cluster.batch import WorkerOptions, cluster_results

    image, question, code = cards[0]
    image.save(tmp_path / "a.png")
    lines = [{"image": "a.png", "question": question}] * 5 + [{"image": "b.png", "question": question}]
    questions, output = tmp_path / "pairs.jsonl", tmp_path / "answers.jsonl"
    questions.write_text("\n".join(map(json.dumps, lines)))
    options, workers = BatchOptions(max_tokens=8), WorkerOptions(2, slots=1, cpus=0.5)
    results = cluster_results(open_nano(nano_bundle), questions, options, workers)
    steps = []
    done = write_answers(questions, output, "run", False, results, lambda *step: steps.append(step))
    assert (done.answered, done.failed, done.before) == (5, 1, 0) and steps[-1] == (6, 6)
    records = {record["line"]: record for record in map(json.loads, output.read_text().splitlines())}
    assert {records[line]["answer"] for line in range(1, 6)} == {code}
    assert "b.png: no such file" in records[6]["error"]
    assert write_answers(questions, output, "run", False, results, lambda *step: None).before == 6
