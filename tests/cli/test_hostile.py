"""Text that is none, terminals of few characters, and what would take a terminal over."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from support.refusals import one_line_error

from uhd_export.runtime.bundle import manifest as manifests
from uhd_export.runtime.errors import UhdError, explain, one_line, printable
from uhd_export.runtime.language.prompt import check_text
from uhd_export.runtime.terminal.streams import print_anything
from uhd_export.runtime.terminal.text import cell

TITLE = "\x1b]0;owned\x07"


def forged(bundle, folder, change):
    """A copy of `bundle` whose manifest is changed and signed anew."""
    shutil.copytree(bundle, folder, copy_function=os.link)
    path = folder / manifests.MANIFEST
    record = json.loads(path.read_text())
    change(record)
    record["digest"] = manifests._digest(record)
    path.unlink()
    path.write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["source"].update(id=TITLE),
        lambda r: r["tools"].update({TITLE: "1"}),
        lambda r: r["tools"].update(onnx="\x9b2J"),
        lambda r: r["tools"].update(onnx="a\nb"),
        lambda r: r["tools"].update(onnx="\u202efile"),
        lambda r: r["files"].update({f"{TITLE}.bin": {"bytes": 1, "sha256": ""}}),
        lambda r: r["parity"].append(dict.fromkeys(("part", "inputs", "metric"), TITLE)),
        lambda r: r.update({TITLE: 1}),
        lambda r: r.update(backend="x" * 100_000),
    ],
)
@pytest.mark.parametrize("command", [["inspect"], ["inspect", "--json"], ["check"]])
def test_no_field_of_a_manifest_reaches_the_terminal(golden_bundle, tmp_path, fails, change, command):
    line = fails(*command, forged(golden_bundle, tmp_path / "forged", change))
    assert printable(line) == line and len(line) < 700


@pytest.mark.parametrize("name", [f"{TITLE}", "[red]x", "a\nb", "b\udcff"])
def test_names_of_files_are_shown_not_obeyed(fails, golden_bundle, tmp_path, name):
    folder = tmp_path / name
    for line in (
        fails("inspect", folder),
        fails("run", golden_bundle, folder, "What?"),
        fails("build", folder, "-o", tmp_path / "out"),
    ):
        assert printable(line) == line


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_of_few_characters(golden_bundle, encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    code = (
        "import sys; from uhd_export.runtime.terminal.streams import print_anything; print_anything()\n"
        "print('漢 é \\udcff'); print('🙂', file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, env=environment)
    assert done.returncode == 0 and b"\\u6f22" in done.stdout and b"\\U0001f642" in done.stderr


def test_streams_that_are_no_files_stay(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    print_anything()


def test_what_printable_leaves():
    assert printable("é漢🙂\t\n") == "é漢🙂\t\n"
    assert printable(TITLE) == "\\x1b]0;owned\\x07" and printable("\ud800") == "\\ud800"
    assert printable("\x9b\u202e") == "\\x9b\\u202e" and cell("[b]") == "\\[b]"
    long = one_line("start " + "x" * 100_000 + " remedy")
    assert len(long) < 610 and long.startswith("start") and long.endswith("remedy")
    assert explain(UhdError(f"a\n{TITLE} b")) == "a \\x1b]0;owned\\x07 b"


@pytest.mark.parametrize("text", ["What is \udcff?", "\ud800", 3, None, b"What?"])
def test_a_question_that_is_no_text_is_refused(text):
    with one_line_error("question: "):
        check_text(text, "question")


def test_a_question_of_other_bytes_is_one_line(fails, golden_bundle, image_file):
    line = fails("run", golden_bundle, image_file, "What is \udcff?", "--max-slices", 1)
    assert "question: character 9 is none of Unicode" in line
