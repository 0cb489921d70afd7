"""A file is whole or as it was; what the machine lacks is one line with the remedy."""

import errno
import os

import pytest

from uhd_export.runtime.errors import UhdError, explain, is_disk_full, is_out_of_memory
from uhd_export.runtime.files import replacing, write_file


def test_a_file_is_written_whole(tmp_path):
    path = tmp_path / "a"
    for content, expected in (("é", "é".encode()), (b"\0\1", b"\0\1"), (memoryview(b"xy"), b"xy")):
        write_file(path, content)
        assert path.read_bytes() == expected
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_what_was(tmp_path, error):
    path = tmp_path / "a"
    write_file(path, "before")
    with pytest.raises(type(error)), replacing(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_content_is_on_disk_before_the_name(tmp_path, monkeypatch):
    order, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *pair: (order.append("rename"), replace(*pair)))
    write_file(tmp_path / "a", "x")
    assert order == ["fsync", "rename", "fsync"]


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "not enough memory"),
        (RuntimeError("bad_function_call: Failed to allocate memory for requested buffer"), "not enough mem"),
        (RuntimeError("std::bad_alloc"), "not enough memory"),
        (ImportError("libx.so: failed to map segment from shared object"), "not enough memory"),
        (RuntimeError("can't start new thread"), "no more threads"),
        (RuntimeError("pthread_create failed, error code: 11"), "no more threads"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "no more threads"),
        (OSError(errno.EMFILE, "Too many open files", "/x"), "too many open files"),
        (OSError(errno.EFBIG, "File too large", "/x"), "/x: file too large"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "/x"), "/x: file name too long"),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"), "no folder"),
        (OSError("20 requested and 7 written"), "disk full"),
    ],
)
def test_what_the_machine_lacks_is_one_line(error, words):
    assert explain(error).startswith(words)
    assert is_out_of_memory(error) == (words.startswith(("not enough mem", "no more threads")))
    assert is_disk_full(error) == ("disk" in words or "too large" in words)


def test_other_errors_are_none_of_these():
    for error in (ValueError("x"), OSError(errno.ENOENT, "no"), UhdError("broken")):
        assert not is_disk_full(error) and not is_out_of_memory(error)
