"""A folder that appears whole or not at all, without building anything."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import faults
from support.folders import leftovers

import uhd_export.bundle.staging as staging
from uhd_export.bundle.exclusive import exclusive
from uhd_export.bundle.staging import staged_folder
from uhd_export.runtime.bundle import manifest as manifests
from uhd_export.runtime.bundle.manifest import MANIFEST
from uhd_export.runtime.errors import UhdError, explain


def write(out, content="new", names=("part.bin",), **options):
    with staged_folder(out, **options) as folder:
        record = {"schema_version": 1, "files": {name: {} for name in names}}
        (folder / MANIFEST).write_text(json.dumps(record | {"digest": manifests._digest(record)}))
        for name in names:
            (folder / name).write_text(content)


@pytest.fixture
def bundle(tmp_path):
    write(tmp_path / "bundle", "old")
    return tmp_path / "bundle"


def test_a_link_to_a_bundle_is_followed(bundle, tmp_path):
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "latest"
    link.symlink_to(bundle)
    write(link, force=True)
    assert link.is_symlink() and (bundle / "part.bin").read_text() == "new"
    assert (leftovers(tmp_path), leftovers(tmp_path / "links")) == (["bundle", "links"], ["latest"])


@pytest.mark.parametrize("name", ["thesis.txt", "notes/", ".git/", ".env"])
def test_files_of_others_in_a_bundle_are_not_deleted(bundle, name):
    (bundle / ".DS_Store").write_text("the file manager's own")
    path = bundle / name.rstrip("/")
    path.mkdir() if name.endswith("/") else path.write_text("irreplaceable")
    with pytest.raises(UhdError, match=f"holds {path.name}, .*; move it away, or choose another"):
        write(bundle, force=True)
    assert leftovers(bundle) == sorted([".DS_Store", MANIFEST, path.name, "part.bin"])
    path.rmdir() if path.is_dir() else path.unlink()
    write(bundle, force=True)
    assert leftovers(bundle) == [MANIFEST, "part.bin"]


def test_a_listed_name_that_is_a_folder_is_not_deleted(bundle):
    (bundle / "part.bin").unlink()
    (bundle / "part.bin").mkdir()
    (bundle / "part.bin" / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(UhdError, match=r"holds part\.bin, which is not of the bundle"):
        write(bundle, force=True)
    assert (bundle / "part.bin" / "thesis.txt").read_text() == "irreplaceable"


@pytest.mark.parametrize("text", ["{", "[]", '{"files": 3}', '{"name": "My app", "icons": []}', None])
def test_a_manifest_of_something_else_is_not_replaced(bundle, text):
    if text is None:  # a bundle's, edited by hand
        text = (bundle / MANIFEST).read_text().replace('"digest"', '"name": "", "digest"')
    (bundle / MANIFEST).write_text(text)
    with pytest.raises(UhdError, match="is no bundle, so --force does not replace it"):
        write(bundle, force=True)
    assert (bundle / "part.bin").read_text() == "old"


def test_a_link_in_a_bundle_goes_and_what_it_leads_to_stays(bundle, tmp_path):
    (tmp_path / "elsewhere").write_text("weights")
    (bundle / "part.bin").unlink()
    (bundle / "part.bin").symlink_to(tmp_path / "elsewhere")
    write(bundle, force=True)
    assert (tmp_path / "elsewhere").read_text() == "weights" and (bundle / "part.bin").read_text() == "new"


@pytest.mark.parametrize("swap", [True, False])
def test_killed_at_every_event_the_next_build_finds_a_bundle(bundle, tmp_path, monkeypatch, swap):
    """Wherever a replacement is cut off, one bundle is whole; the next build leaves nothing else."""
    if not swap:
        monkeypatch.setattr(staging, "_exchange", lambda one, other: False)
    number, whole = 0, []
    while True:
        number += 1
        killed = faults.killed_at(number, tmp_path, lambda: write(bundle, "new", force=True))
        if swap:  # at no moment there is none
            assert (bundle / "part.bin").read_text() in ("old", "new")
        with pytest.raises(UhdError, match="exists already"):
            write(bundle, "newer")  # rolls back what was cut off, and refuses
        whole.append((bundle / "part.bin").read_text())
        assert leftovers(bundle) == [MANIFEST, "part.bin"]
        ours = {f".bundle.uhd-{kind}" for kind in ("partial", "old", "lock")}
        assert set(leftovers(tmp_path)) - ours == {"bundle"}
        write(bundle, "old", force=True)
        assert leftovers(tmp_path) == ["bundle"]
        if not killed:
            break
    assert number > 8 and set(whole) == {"old", "new"}


def test_leftovers_of_killed_builds_go_with_the_next(tmp_path):
    out = tmp_path / "b"
    code = (
        "import os, sys; from pathlib import Path; from uhd_export.bundle.staging import staged_folder\n"
        "with staged_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'weights').write_bytes(bytes(1000)); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code, str(out)])
    assert done.returncode == -9 and leftovers(tmp_path) == [".b.uhd-lock", ".b.uhd-partial"]
    write(out)
    assert leftovers(tmp_path) == ["b"]


def test_two_builds_to_one_output(tmp_path):
    out = tmp_path / "b"
    with staged_folder(out) as folder:
        (folder / "part.bin").write_text("first")
        with pytest.raises(UhdError, match="another process is writing it"):
            write(out)
        write(tmp_path / "c")
    assert leftovers(tmp_path) == ["b", "c"] and leftovers(out) == ["part.bin"]
    with exclusive(out):
        assert leftovers(tmp_path) == [".b.uhd-lock", "b", "c"]


@pytest.mark.parametrize(
    "number, words",
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EROFS, "cannot be written|read-only"),
        (errno.EACCES, "cannot be written|permission denied"),
        (errno.EMFILE, "too many open files"),
        (errno.ENOMEM, "not enough memory"),
    ],
)
def test_what_the_system_refuses_is_one_line_and_leaves_nothing(bundle, tmp_path, number, words):
    total = faults.events(tmp_path, lambda: write(bundle, "old", force=True))
    for at in range(1, total + 1):
        error = OSError(number, os.strerror(number), str(tmp_path / "bundle"))
        raised = faults.failing_at(at, error, tmp_path, lambda: write(bundle, "new", force=True))
        if raised is not None:
            line = explain(raised)
            assert line is not None and re.search(words, line), (at, line)
        assert (bundle / "part.bin").read_text() in ("old", "new")
        write(bundle, "old", force=True)
        assert leftovers(tmp_path) == ["bundle"] and leftovers(bundle) == [MANIFEST, "part.bin"]


def test_everything_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    order, sync, rename = [], staging.sync, os.rename
    monkeypatch.setattr(staging, "sync", lambda path: (order.append(path.name), sync(path)))
    monkeypatch.setattr(os, "rename", lambda *pair, **more: (order.append("rename"), rename(*pair, **more)))
    with staged_folder(tmp_path / "b") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("x")
    assert sorted(order[:3]) == [".b.uhd-partial", "deep", "file"] and order[3:] == ["rename", tmp_path.name]


def test_parents_that_were_made_go_with_a_failure(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path / "a" / "b" / "c" / "out"):
        raise KeyboardInterrupt
    assert leftovers(tmp_path / "a") == []
    with pytest.raises(UhdError, match="make room"):
        write(tmp_path / "a" / "b" / "out", needed=10**18)
    assert leftovers(tmp_path) == ["a"] and leftovers(tmp_path / "a") == []
    write(tmp_path / "a" / "b" / "out")
    assert leftovers(tmp_path / "a" / "b" / "out") == [MANIFEST, "part.bin"]


@pytest.mark.parametrize("force", [True, False])
def test_a_mount_point_is_refused_before_anything_is_written(bundle, tmp_path, monkeypatch, force):
    """Its name cannot change: a container's /out would fail when everything is done."""
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", *([bundle] if force else [])):
        monkeypatch.setattr(os.path, "ismount", lambda path, out=out: Path(path) == out)
        with pytest.raises(UhdError, match=f"output {out}: is a mount point; choose a folder inside it"):
            write(out, force=force)


def test_too_little_space_is_told_in_units_that_suit(tmp_path, monkeypatch):
    usage = staging.shutil.disk_usage(tmp_path)._replace(free=2_000_000)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UhdError, match=r"about 3\.50 MB are needed but 2\.00 MB are free"):
        write(tmp_path / "out", needed=3_500_000)
