"""A file of questions: all answered, failures told by line, going on where it stopped."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from support.refusals import one_line_error

from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.serving.batch.file import BatchOptions, answer_file, write_answers
from uhd_export.runtime.serving.scheduling.scheduler import Limits


@pytest.fixture
def questions(tmp_path, cards):
    """A file of five lines, two of which cannot be answered."""
    for index, (image, *_) in enumerate(cards):
        image.save(tmp_path / f"{index}.png")
    records = [
        {"image": "0.png", "question": cards[0][1], "answer": cards[0][2]},
        {"image": "missing.png", "question": "What?"},
        {
            "image": "1.png",
            "conversations": [
                {"from": "human", "value": f"<image>\n{cards[1][1]}"},
                {"from": "gpt", "value": cards[1][2]},
                {"from": "human", "value": "Sure?"},
            ],
        },
        {"image": None, "question": "Say it.", "answer": 900},  # of which a batch has no use
    ]
    lines = [json.dumps(record) for record in records]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join([*lines[:2], "{broken", "", *lines[2:]]) + "\n")
    return path


def read(path):
    return {record["line"]: record for record in map(json.loads, path.read_text().splitlines())}


def test_every_line_is_answered_or_told_why_not(serve, questions, tmp_path, cards):
    steps = []
    output = tmp_path / "answers.jsonl"
    options = BatchOptions(max_tokens=8)
    result = answer_file(serve(slots=2), questions, output, options, lambda *step: steps.append(step))
    assert (result.answered, result.failed, result.before) == (3, 2, 0)
    assert steps == [(done, 5) for done in range(6)]
    records = read(output)
    assert sorted(records) == [1, 2, 3, 5, 6]
    assert records[1]["answer"] == cards[0][2] and records[1]["finish_reason"] == "stop"
    assert "missing.png: no such file" in records[2]["error"]
    assert "not a JSON object" in records[3]["error"]
    assert records[5]["answers"][0] == cards[1][2] and len(records[5]["answers"]) == 2
    assert records[6]["completion_tokens"] >= 1


def test_images_wait_for_the_memory_that_is_reserved(serve, questions, tmp_path):
    """Where there is room for those of one line at a time, the others wait; none is refused."""
    service = serve(slots=2, limits=Limits(crop_bytes=1000))
    result = answer_file(service, questions, tmp_path / "answers.jsonl", BatchOptions(max_tokens=2))
    assert (result.answered, result.failed) == (3, 2)


def test_it_goes_on_where_it_stopped(serve, questions, tmp_path, monkeypatch):
    output, options = tmp_path / "answers.jsonl", BatchOptions(max_tokens=4)
    service = serve(slots=1)
    answer_file(service, questions, output, options)
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    output.write_bytes(lines[0] + lines[1] + lines[2][:20])  # killed while it wrote the third
    asked = []
    submit = service.submit
    monkeypatch.setattr(service, "submit", lambda request: asked.append(request) or submit(request))
    result = answer_file(service, questions, output, options)
    assert result.before == 2 and result.answered + result.failed == 5
    assert {line: r.get("answer") for line, r in read(output).items()} == {
        line: record.get("answer") for line, record in read_bytes(whole).items()
    }
    answered_before = sum("error" not in json.loads(line) for line in lines[:2])
    assert len(asked) == 4 - answered_before  # the conversation has two turns

    asked.clear()
    Image.new("RGB", (40, 40)).save(tmp_path / "missing.png")
    assert answer_file(service, questions, output, options).failed == 2 and not asked
    again = answer_file(service, questions, output, BatchOptions(max_tokens=4, retry=True))
    assert (again.answered, again.failed, again.before) == (4, 1, 3) and len(asked) == 1
    assert len(output.read_text().splitlines()) == 5


def read_bytes(content):
    return {record["line"]: record for record in map(json.loads, content.splitlines())}


def test_another_file_or_another_run_is_not_mixed_in(serve, questions, tmp_path):
    output = tmp_path / "answers.jsonl"
    service = serve(slots=1)
    answer_file(service, questions, output, BatchOptions(max_tokens=2))
    before = output.read_bytes()
    with pytest.raises(UhdError, match="with other options"):
        answer_file(service, questions, output, BatchOptions(max_tokens=3))
    questions.write_text(questions.read_text().replace("Say it.", "Say what?"))
    with pytest.raises(UhdError, match="answers other questions"):
        answer_file(service, questions, output, BatchOptions(max_tokens=2))
    assert output.read_bytes() == before
    output.write_text("[1]\n")
    with pytest.raises(UhdError, match="other things than answers"):
        answer_file(service, questions, output, BatchOptions(max_tokens=2))


@pytest.mark.parametrize(
    "content", ["my notes, without a last newline", '{"line": 1, "of": "my own"}', "[1]\n{"]
)
def test_another_file_is_not_touched(questions, tmp_path, content):
    output = tmp_path / "notes.txt"
    output.write_text(content)
    with pytest.raises(UhdError, match="holds other things than answers"):
        write_answers(questions, output, "run", False, no_results, lambda *step: None)
    assert output.read_text() == content


def test_where_answers_cannot_go(questions, tmp_path):
    questions.write_text(questions.read_text().rstrip())
    before = questions.read_text()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(questions)
    refused = {
        questions: "holds the questions",
        tmp_path / "link": "holds the questions",
        tmp_path / "folder": "is no plain file",
        Path("/dev/null"): "is no plain file",
        tmp_path / "none" / "a.jsonl": "is no folder",
        questions / "a.jsonl": "is no folder",
        tmp_path / ("x" * 300): "File name too long",
    }
    for output, reason in refused.items():
        with one_line_error(reason):
            write_answers(questions, output, "run", False, no_results, lambda *step: None)
    assert questions.read_text() == before


def test_a_line_that_is_written_in_parts_is_whole(questions, tmp_path, monkeypatch):
    class Slow(io.FileIO):
        def write(self, data):
            return super().write(data[:7])

    monkeypatch.setattr(Path, "open", lambda path, *_, **__: Slow(path, "a"))
    results = lambda lines: ((line, {"answer": "it"}) for line in lines)  # noqa: E731
    write_answers(questions, tmp_path / "a.jsonl", "run", False, results, lambda *step: None)
    monkeypatch.undo()
    assert [record["answer"] for record in read(tmp_path / "a.jsonl").values()] == ["it"] * 5


def no_results(lines):
    raise AssertionError("nothing is to be asked")
