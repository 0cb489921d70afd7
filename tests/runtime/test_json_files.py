"""JSON that others wrote: of a sane size and depth, each refusal one short line."""

import pytest
from support.refusals import one_line_error

from uhd_export.runtime import json_files
from uhd_export.runtime.json_files import DEEPEST, parse_json, read_json

HOSTILE = {
    "deep": ("[" * 100_000 + "]" * 100_000, "levels"),
    "deep objects": ('{"a":' * 5000 + "1" + "}" * 5000, "levels"),
    "just too deep": ("[" * (DEEPEST + 2) + "]" * (DEEPEST + 2), "levels"),
    "huge": ("9" * 10_000, "a number of 10000 digits"),
    "large": ("9" * 41, "a number of 41 digits"),
    "surrogate": (r'["\ud800"]', "lone surrogate"),
    "surrogate key": (r'{"\udfff": 1}', "lone surrogate"),
    "none": ("", "Expecting value"),
    "half": ('{"a": ', "Expecting value"),
    "no text": (b"\xff\xfe", "can't decode"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_breaks_a_reader_is_one_line(kind, tmp_path):
    content, words = HOSTILE[kind]
    with pytest.raises(ValueError, match=words):
        parse_json(content)
    path = tmp_path / "x.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with one_line_error(f"x.json: not readable as JSON .*{words}.*; download it again"):
        read_json(path, "download it again")


def test_the_size_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "LARGEST", 10 << 20)
    (tmp_path / "x").write_bytes(b" " * ((10 << 20) + 1))
    with one_line_error("more than 10 MiB"):
        read_json(tmp_path / "x")


def test_what_is_right_is_read(tmp_path):
    (tmp_path / "x").write_text('{"a": [1, 2.5, "é🙂", null, true], "n": 18446744073709551615}')
    assert read_json(tmp_path / "x") == {"a": [1, 2.5, "é🙂", None, True], "n": 2**64 - 1}
    assert parse_json("[" * DEEPEST + "]" * DEEPEST)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "absent")
