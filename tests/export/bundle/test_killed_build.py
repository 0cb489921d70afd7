"""A build that is killed leaves the bundle that was there, and nothing that the next one does not remove."""

import errno
import os

import pytest
from support import faults
from support.folders import leftovers

from uhd_export.bundle.build import build_bundle
from uhd_export.runtime.bundle.integrity import verify_files
from uhd_export.runtime.bundle.manifest import read_manifest
from uhd_export.runtime.errors import explain

pytestmark = pytest.mark.slow


def build(out):
    build_bundle("nano", out, verify=False, force=True)


def digests(out):
    manifest = read_manifest(out)
    verify_files(out, manifest, remembered=False)
    return {name: record.sha256 for name, record in manifest.files.items()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the bundle `b`, and the events of replacing it."""
    folder = tmp_path_factory.mktemp("killed")
    build(folder / "b")
    return folder, faults.events(folder, lambda: build(folder / "b")), digests(folder / "b")


@pytest.mark.parametrize("part", [0.1, 0.4, 0.7, -8, -2])
def test_killed(built, part):
    folder, total, expected = built
    number = total + part if part < 0 else max(1, int(total * part))
    assert faults.killed_at(number, folder, lambda: build(folder / "b"))
    assert digests(folder / "b") == expected
    assert set(leftovers(folder)) <= {"b", ".b.uhd-partial", ".b.uhd-old", ".b.uhd-lock"}


@pytest.mark.parametrize("part", [0.2, 0.6])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EMFILE, errno.ENOMEM, errno.EROFS])
def test_what_the_system_lacks_is_one_line(built, part, number):
    folder, total, expected = built
    error = OSError(number, os.strerror(number), str(folder / ".b.uhd-partial" / "x"))
    raised = faults.failing_at(int(total * part), error, folder, lambda: build(folder / "b"))
    line = explain(raised)
    assert line and any(words in line for words in ("disk is full", "too many open", "not enough", "written"))
    assert leftovers(folder) == ["b"] and digests(folder / "b") == expected


def test_the_next_build_leaves_nothing_else(built):
    folder, _, expected = built
    build(folder / "b")
    assert leftovers(folder) == ["b"] and digests(folder / "b") == expected
