"""Every command through the real entry point, in this process and in processes of their own."""

import contextlib
import json
import os
import pty
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support.folders import leftovers

import uhd_export.bundle.build as build
import uhd_export.bundle.check as check
import uhd_export.nano.evaluate as evaluate
from uhd_export.cli.main import STOPPED
from uhd_export.runtime.bundle.manifest import Parity
from uhd_export.runtime.image.pattern import pattern

REPOSITORY = Path(__file__).parents[2]


def process(*arguments, stderr=subprocess.PIPE, **options):
    command = [sys.executable, "-P", "-m", "uhd_export", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=stderr, text=True, **options
    )


# Commands


def test_build_inspect_check(call, spoken_checkpoint, tmp_path, monkeypatch):
    # What is measured is tested in test_bundle; here the figure is given.
    entry = Parity("vision", "pattern", "relative error", 2e-6, 1e-3, None)
    monkeypatch.setattr(build, "measure_parity", lambda *args, **options: [entry])
    monkeypatch.setattr(check, "measure_parity", lambda *args, **options: [replace(entry, value=3e-6)])
    out = tmp_path / "out"
    clip = spoken_checkpoint / "clip"
    options = ["--layout", "merged", "--grid", "fix", "--max-slices", 4, "--context", 900]
    done = call("build", spoken_checkpoint, "-o", out, "--vision-tower", clip, *options)
    assert done.exit_code == 0, done.output
    assert "2.0e-06" in done.stdout and "6 files" in done.stdout
    facts = json.loads(call("inspect", out, "--json").stdout)
    assert facts["settings"]["layout"] == "merged" and facts["settings"]["grid_mode"] == "fix"
    assert (facts["settings"]["max_slices"], facts["settings"]["context"]) == (4, 900)
    text = call("inspect", out).stdout
    assert "merged" in text and facts["files"]["vision.onnx"]["sha256"][:16] in text
    done = call("check", out)
    assert done.exit_code == 0 and "SHA-256 as recorded" in done.stdout
    assert "2.0e-06" in done.stdout and "3.0e-06" in done.stdout
    monkeypatch.setattr(check, "measure_parity", lambda *args, **options: [replace(entry, value=1.0)])
    done = call("check", out)
    assert done.exit_code == 2 and "over" in done.stdout
    assert done.stderr.startswith("error: ") and "parity is over the limit" in done.stderr
    monkeypatch.setattr(check, "_recorded", lambda source: None)
    done = call("check", out)
    assert done.exit_code == 0 and "not at hand: parity not measured" in done.stdout


def test_run_streams_an_answer(call, golden_bundle, image_file):
    arguments = ["run", golden_bundle, image_file, "What is this?", "--max-new-tokens", 3, "--threads", 1]
    done = call(*arguments)
    assert done.exit_code == 0 and done.stdout.strip()
    assert done.stderr == "(stopped after 3 tokens; --max-new-tokens allows more)\n"
    assert call(*arguments).stdout == done.stdout
    sampled = call(*arguments, "--temperature", 9, "--top-k", 50, "--top-p", 0.9, "--seed", 1)
    assert sampled.exit_code == 0 and sampled.stdout != done.stdout


def test_a_full_context_says_how_to_have_more(call, golden_bundle, image_file):
    done = call("run", golden_bundle, image_file, "What?", "--context", 400, "--max-new-tokens", 900)
    remedy = "lower --max-slices or give a larger --context, up to 4096"
    assert done.stderr == f"(stopped because the context is full; {remedy})\n"


def test_run_with_several_images(call, fails, golden_bundle, image_file):
    arguments = ["run", golden_bundle, image_file, "Compare.", "--image", image_file, "--max-new-tokens", 2]
    assert call(*arguments).stdout.strip()
    assert "no such file" in fails(*arguments, "--image", "absent.png")


def test_chat_reads_questions_until_they_end(call, golden_bundle, image_file):
    done = call("run", golden_bundle, image_file, "--max-new-tokens", 2, input="One?\nTwo?\n\nThree?\n")
    assert done.exit_code == 0, done.output
    assert len(done.stdout.splitlines()) == 3
    bad = call("run", golden_bundle, image_file, "--max-new-tokens", 2, input=b"One?\ncaf\xe9?\n<image>\n")
    assert bad.exit_code == 2 and len(bad.stdout.splitlines()) == 2
    first, last = (line for line in bad.stderr.splitlines() if line.startswith("error: "))
    assert "character 4 is none of Unicode" in first and last.endswith(
        "1 of 3 were not answered, as told above"
    )


def test_eval_counts_exact_answers(call, golden_bundle, monkeypatch):
    # The golden model answers nonsense; an answer key that agrees with it once shows that counting works.
    questions = [(pattern(200, 150), "A?", "never"), (pattern(200, 150), "B?", "never")]
    monkeypatch.setattr(evaluate, "held_out_question", lambda index, seed: questions[index])
    done = call("eval", golden_bundle, "--count", 2, "--max-slices", 1, "--json", "--threads", 1)
    facts = json.loads(done.stdout)
    assert (facts["exact"], facts["total"], facts["accuracy"]) == (0, 2, 0.0)
    said = facts["misses"][1]["got"]
    questions[1] = (*questions[1][:2], said)
    assert call("eval", golden_bundle, "--count", 2).stdout.startswith("1 of 2 answers exact: 50.0%")


@pytest.mark.slow
def test_profile_as_json(call, golden_bundle):
    options = ["--size", "200x150", "--repeats", 1, "--tokens", 2, "--grid", "fix", "--threads", 1]
    facts = json.loads(call("profile", golden_bundle, *options, "--json").stdout)
    assert [mode["grid_mode"] for mode in facts["modes"]] == ["fix"]
    assert facts["size"] == [200, 150] and facts["machine"]["threads"] == "1"
    assert "Hiwin" in call("profile", golden_bundle, *options).stdout


# Processes: what only a real one shows


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interrupted_build_leaves_nothing(spoken_checkpoint, tmp_path, name):
    out = tmp_path / "out"
    running = process("build", spoken_checkpoint, "-o", out, "--vision-tower", spoken_checkpoint / "clip")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.*/language.onnx")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert leftovers(tmp_path), running.communicate()
    running.send_signal(signal.Signals[name])
    _, errors = running.communicate(timeout=60)
    *said, error = errors.splitlines()
    assert (running.returncode, error) == (130, f"error: {STOPPED}")
    assert [line.split()[0] for line in said] == ["about", "needs"]
    assert leftovers(tmp_path) == []


@pytest.fixture
def asked(golden_bundle, image_file):
    """`asked(question)`: a conversation that was asked and has begun a very long answer."""
    running = []

    def start(*options):
        arguments = ["run", golden_bundle, image_file, "--max-new-tokens", 3500, "--threads", 1, *options]
        running.append(process(*arguments, stdin=subprocess.PIPE))
        running[0].stdin.write("What is this?\n")
        running[0].stdin.flush()
        assert running[0].stdout.read(1)
        return running[0]

    yield start
    for one in running:
        one.kill()
        one.communicate()


def test_ctrl_c_ends_questions_that_come_through_a_pipe(asked):
    """At a terminal it ends the answer alone (`tests/runtime/terminal`); nobody is there to ask on."""
    running = asked()
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate("Another?\n", timeout=60)
    assert (running.returncode, errors) == (130, f"error: {STOPPED}\n")


def test_sigterm_ends_a_conversation(asked):
    running = asked()
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=60) == 130
    assert running.stderr.read() == f"error: {STOPPED}\n"


@pytest.mark.slow
def test_full_disk_leaves_nothing(spoken_checkpoint, tmp_path):
    def limit():
        # Writing past this size fails as on a full disk, at any place in any library.
        resource.setrlimit(resource.RLIMIT_FSIZE, (20 * 2**20, 20 * 2**20))

    clip = spoken_checkpoint / "clip"
    running = process(
        "build", spoken_checkpoint, "-o", tmp_path / "out", "--vision-tower", clip, preexec_fn=limit
    )
    output, errors = running.communicate(timeout=120)
    assert running.returncode == 2, errors
    *said, error = errors.splitlines()
    assert error.startswith("error: output") and "disk is full" in error
    assert [line.split()[0] for line in said] == ["about", "needs"]  # what it takes, before it starts
    assert output == "" and leftovers(tmp_path) == []


def read_terminal(descriptor):
    """All that was written to a terminal whose writers are gone."""
    said = b""
    with contextlib.suppress(OSError):  # how Linux says that nobody writes any more
        while piece := os.read(descriptor, 65536):
            said += piece
    return said.decode()


def test_a_terminal_sees_what_is_waited_for_and_keeps_nothing_of_it(golden_bundle, image_file):
    arguments = ["run", golden_bundle, image_file, "What?", "--max-new-tokens", 2]
    plain, _ = process(*arguments).communicate(timeout=60)
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    running = process(*arguments, stderr=theirs, env=environment)
    os.close(theirs)
    said = read_terminal(ours)
    os.close(ours)
    assert running.communicate(timeout=60) == (plain, None)
    for label in ("opening the image", "opening the bundle", "cutting the image", "reading"):
        assert label in said
    erase = "\x1b[2K"
    assert said.rpartition(erase)[2] == "(stopped after 2 tokens; --max-new-tokens allows more)\r\n"


def test_files_are_checked_where_torch_is_not_installed(golden_bundle, tmp_path):
    def run(*arguments):
        code = "import sys; sys.modules['torch'] = None; from uhd_export.cli.main import main; main()"
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)

    remedy = "this needs torch, which is not installed: pip install 'uhd-export[export]'\n"
    for arguments in (
        ["check", golden_bundle, "--checkpoint", "nano"],
        ["build", "nano", "-o", tmp_path / "out"],
        ["quantize", "nano", "-o", tmp_path / "out"],
    ):
        done = run(*arguments)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {remedy}")
    done = run("check", golden_bundle)
    assert (done.returncode, done.stderr) == (0, "")
    assert "SHA-256 as recorded" in done.stdout and done.stdout.endswith(f"parity not measured: {remedy}")


@pytest.mark.slow
def test_answers_without_torch_and_without_a_terminal(golden_bundle, image_file, tmp_path):
    # A torch that cannot be imported stands for a device without one.
    for name in ("torch", "transformers", "onnx", "safetensors"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not on this device')\n")
    paths = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    environment = {**os.environ, "PYTHONPATH": paths}
    for arguments in (
        ["run", golden_bundle, image_file, "What?", "--max-new-tokens", 2],
        ["inspect", golden_bundle],
        ["profile", golden_bundle, "--size", "100x100", "--repeats", 1, "--tokens", 1, "--grid", "fix"],
        ["eval", golden_bundle, "--count", 1, "--max-slices", 1],
    ):
        output, errors = (running := process(*arguments, env=environment)).communicate(timeout=120)
        assert running.returncode == 0, errors
        assert output.strip()
        assert "\x1b" not in output + errors
        assert errors in ("", "(stopped after 2 tokens; --max-new-tokens allows more)\n")
