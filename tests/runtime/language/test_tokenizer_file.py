"""A tokenizer that contradicts itself panics in the library: here it is one line, and nothing else."""

import json

import pytest
from support.refusals import one_line_error
from tokenizers import Tokenizer, models, processors

from uhd_export.runtime.language.tokenizer_file import library_errors, read_tokenizer


def saved(path, change=lambda record: None):
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "<s>": 2}, [], unk_token="a"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    record = json.loads(tokenizer.to_str())
    change(record)
    path.write_text(json.dumps(record))
    return path


def unknown_token(record):
    record["post_processor"]["single"][0]["SpecialToken"]["id"] = "zzz"


def test_a_panic_is_one_line(tmp_path, capfd):
    with one_line_error(r"tokenizer .*t\.json: cannot be read \(no entry found for key\); build"):
        read_tokenizer(saved(tmp_path / "t.json", unknown_token), "build the bundle again")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 10_000, "null"])
def test_what_is_no_tokenizer_is_one_line(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    with one_line_error("cannot be read"):
        read_tokenizer(tmp_path / "t.json", "download it again")
    with one_line_error("no such file"):
        read_tokenizer(tmp_path / "absent.json", "download it again")


def test_ctrl_c_stays_what_it_is(tmp_path):
    assert read_tokenizer(saved(tmp_path / "t.json"), "").encode("ab").ids == [2, 0, 1]
    with pytest.raises(KeyboardInterrupt), library_errors("x", "y"):
        raise KeyboardInterrupt
