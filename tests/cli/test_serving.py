"""The commands that answer many questions: serve as a process, batch and eval in this one."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx
import pytest


@pytest.fixture
def questions(tmp_path, image_file):
    """Two questions about an image, with answers."""
    path = tmp_path / "pairs.jsonl"
    lines = [
        {"image": image_file.name, "question": question, "answer": answer}
        for question, answer in (("what", "it"), ("why", "so"))
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_batch_answers_a_file_and_goes_on(call, golden_bundle, questions, image_file, tmp_path):
    output = tmp_path / "answers.jsonl"
    arguments = ("batch", golden_bundle, questions, "-o", output, "--image-root", image_file.parent)
    options = ("--max-new-tokens", 3, "--slots", 2, "--threads", 1)
    done = call(*arguments, *options)
    assert done.exit_code == 0 and done.stdout == f"{output}: 2 lines\n", done.output
    again = call(*arguments, *options)
    assert again.stdout == f"{output}: 2 lines, 2 of them before\n"
    assert {json.loads(line)["line"] for line in output.read_text().splitlines()} == {1, 2}


def test_what_is_served_is_warned_of_whole_and_refused_before_weights_are_loaded(
    call, golden_bundle, questions, tmp_path, monkeypatch
):
    """Of the slots' caches, images and crops; 4 slots of the golden model take 64 MB and the rest 512 MiB."""
    loaded = []
    monkeypatch.setattr("uhd_export.runtime.serving.service.open_engines", lambda *_, **__: loaded.append(1))
    for place in ("planning.bundle", "serving.service"):
        monkeypatch.setattr(f"uhd_export.runtime.{place}.available_memory", lambda: 625_000_000)
    arguments = ("batch", golden_bundle, questions, "-o", tmp_path / "a", "--slots")
    (error,) = call(*arguments, 4).stderr.splitlines()
    assert error.startswith("error: memory: 0.60 GB are needed beside the weights"), error
    assert "use fewer --slots" in error and not loaded
    warning = call(*arguments, 1).stderr.splitlines()[0]
    assert warning.startswith("warning: memory: an answer about a large image takes 0.7 GB"), warning


def test_batch_refuses_in_one_line(fails, golden_bundle, questions, tmp_path):
    assert "no such file" in fails("batch", golden_bundle, tmp_path / "no.jsonl", "-o", tmp_path / "a")
    # Told before the bundle is opened, which is none here.
    assert "is no folder" in fails("batch", tmp_path, questions, "-o", tmp_path / "none" / "a")
    (tmp_path / "a").write_text("{}\n")
    assert "answers other questions" in fails("batch", golden_bundle, questions, "-o", tmp_path / "a")


def test_eval_knows_both_bundles_before_it_asks_one(fails, golden_bundle, questions, image_file, monkeypatch):
    monkeypatch.setattr("uhd_export.runtime.serving.evaluation.evaluate.evaluate_pairs", None)
    arguments = ("eval", golden_bundle, "--data", questions, "--image-root", image_file.parent)
    assert "typo" in fails(*arguments, "--compare", image_file.parent / "typo")


def test_eval_compares_two_bundles_on_data(call, golden_bundle, questions, image_file):
    arguments = ("eval", golden_bundle, "--data", questions, "--image-root", image_file.parent)
    options = ("--max-new-tokens", 3, "--threads", 1)
    facts = json.loads(call(*arguments, *options, "--json").stdout)
    assert facts["measures"]["exact"]["count"] == 2 and len(facts["questions"]) == 2
    done = call(*arguments, *options, "--compare", golden_bundle)
    assert done.exit_code == 0, done.output
    for text in (
        "exact match",
        "ANLS",
        "relaxed accuracy",
        "VQA accuracy",
        "0 better, 0 worse",
        "+0.0 to +0.0",
    ):
        assert text in done.stdout


def test_eval_asks_for_data(fails, golden_bundle):
    assert "need --data" in fails("eval", golden_bundle, "--compare", golden_bundle)
    for name in ("--max-new-tokens", "--slots", "--image-cache"):
        assert f"{name}: is for --data" in fails("eval", golden_bundle, "--count", 1, name, 3)


@contextmanager
def serving(bundle, *options):
    """A process of `serve`, its first line, and its address, where it answers."""
    command = [sys.executable, "-m", "uhd_export", "serve", str(bundle), "--port", "0", "--threads", "1"]
    command += options
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            address = line.partition(": ")[0]
            deadline = time.monotonic() + 10
            while True:
                try:
                    httpx.get(f"{address}/health")
                    break
                except httpx.ConnectError:
                    assert time.monotonic() < deadline
            yield process, line, address
        finally:
            process.kill()


def test_serve_answers_until_it_is_told_to_end(golden_bundle):
    with serving(golden_bundle) as (process, line, address):
        assert address.startswith("http://127.0.0.1:") and "4 slots of" in line
        body = {"messages": [{"role": "user", "content": "why"}], "max_tokens": 2}
        answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=30)
        assert answer.status_code == 200, answer.text
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0, process.stderr.read()
        assert process.stderr.read() == ""


def test_streams_that_are_under_way_at_the_end_come_to_theirs(golden_bundle):
    body = {"messages": [{"role": "user", "content": "why"}], "logit_bias": {"2": -100}, "stream": True}
    body["max_tokens"] = 900
    texts, ends = [], []
    begun = threading.Barrier(3)

    with serving(golden_bundle, "--grace", "60") as (process, _, address):

        def ask():
            with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=60) as answer:
                lines = answer.iter_lines()
                next(lines)
                begun.wait(30)
                texts.append("\n".join(lines))
                ends.append(time.monotonic())

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        begun.wait(30)
        process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        for thread in threads:
            thread.join()
        assert min(ends) - start > 1  # what cuts streams looks twice a second
        assert ["[DONE]" in text and '"length"' in text for text in texts] == [True, True]
        assert process.wait(20) == 0 and process.stderr.read() == ""


def test_serve_refuses_in_one_line(fails, golden_bundle, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port {port}: Address already in use" in fails("serve", golden_bundle, "--port", port)
        arguments = ("serve", golden_bundle, "--cluster", 2)
        assert f"--port {port}: Address already in use" in fails(*arguments, "--port", port)
    assert "--most 1: is less than --cluster 2" in fails(*arguments, "--most", 1)
    assert "--most 3: needs --cluster" in fails("serve", golden_bundle, "--most", 3)
    assert "--device cuda:1: a cluster gives each" in fails(*arguments, "--device", "cuda:1")
    assert "no manifest.json" in fails("serve", tmp_path, "--cluster", 2)
    assert "an empty key" in fails("serve", golden_bundle, "--api-key", "")
    for seconds in ("nan", "0"):
        assert "--timeout" in fails("serve", tmp_path, "--port", 0, "--timeout", seconds)
    assert "context 99999999" in fails("serve", golden_bundle, "--port", 0, "--context", 99999999)
    assert "no manifest.json" in fails("serve", tmp_path, "--port", 0)
    assert "GB are needed" in fails("serve", golden_bundle, "--port", 0, "--slots", 10_000_000)
