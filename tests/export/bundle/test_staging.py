"""A folder that appears whole or not at all, without building anything."""

import json

import pytest
from support.folders import leftovers

import uhd_export.bundle.staging as staging
from uhd_export.bundle.staging import staged_folder
from uhd_export.runtime.bundle.manifest import MANIFEST
from uhd_export.runtime.errors import UhdError


def write(out, **options):
    with staged_folder(out, **options) as folder:
        (folder / MANIFEST).write_text(json.dumps({"files": {"part.bin": {}}}))
        (folder / "part.bin").write_text("new")


@pytest.fixture
def bundle(tmp_path):
    write(tmp_path / "bundle")
    (tmp_path / "bundle" / "part.bin").write_text("old")
    return tmp_path / "bundle"


def test_a_link_to_a_bundle_is_followed(bundle, tmp_path):
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "latest"
    link.symlink_to(bundle)
    write(link, force=True)
    assert link.is_symlink() and (bundle / "part.bin").read_text() == "new"
    assert (leftovers(tmp_path), leftovers(tmp_path / "links")) == (["bundle", "links"], ["latest"])


@pytest.mark.parametrize("name", ["thesis.txt", "notes"])
def test_files_of_others_in_a_bundle_are_not_deleted(bundle, name):
    (bundle / ".DS_Store").write_text("the operating system's own")
    (bundle / "notes").mkdir() if name == "notes" else (bundle / name).write_text("irreplaceable")
    with pytest.raises(UhdError, match=f"holds {name}, .*; move it away, or choose another"):
        write(bundle, force=True)
    assert leftovers(bundle) == [".DS_Store", MANIFEST, *sorted([name, "part.bin"])]
    (bundle / "notes").rmdir() if name == "notes" else (bundle / name).unlink()
    write(bundle, force=True)
    assert leftovers(bundle) == [MANIFEST, "part.bin"]


@pytest.mark.parametrize("text", ["{", "[]", '{"files": 3}'])
def test_a_manifest_that_tells_no_files_is_not_replaced(bundle, text):
    (bundle / MANIFEST).write_text(text)
    with pytest.raises(UhdError, match=r"manifest\.json"):
        write(bundle, force=True)


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


def test_too_little_space_is_told_in_units_that_suit(tmp_path, monkeypatch):
    usage = staging.shutil.disk_usage(tmp_path)._replace(free=2_000_000)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UhdError, match=r"about 3\.50 MB are needed but 2\.00 MB are free"):
        write(tmp_path / "out", needed=3_500_000)
