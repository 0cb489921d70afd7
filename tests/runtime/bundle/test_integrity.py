"""Damage is found before an answer, however large the file; what is remembered is forgotten on any change."""

import json
import os
import shutil

import pytest

from uhd_export.runtime.bundle import integrity
from uhd_export.runtime.bundle.integrity import BEFORE, NOW, OpenFiles, verify_files
from uhd_export.runtime.bundle.manifest import read_manifest
from uhd_export.runtime.errors import UhdError


@pytest.fixture
def large(golden_bundle, monkeypatch, tmp_path):
    """A bundle whose weights count as large, and a cache of its own."""
    monkeypatch.setattr(integrity, "HASH_AT_OPEN", weights(golden_bundle).stat().st_size - 1)
    monkeypatch.setenv("UHD_EXPORT_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(golden_bundle, tmp_path / "bundle")


def weights(folder):
    return max(folder.iterdir(), key=lambda path: path.stat().st_size)


def damage(path, *, keep_time):
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(status.st_size // 2)
        file.write(bytes(4096))
    if keep_time:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_large_files_are_hashed_once(large):
    manifest, path = read_manifest(large), weights(large)
    first = verify_files(large, manifest)
    assert set(first.values()) == {NOW}
    again = verify_files(large, manifest)
    assert again[path.name] == BEFORE and again["tokenizer.json"] == NOW
    assert set(verify_files(large, manifest, remembered=False).values()) == {NOW}
    os.utime(path)
    assert verify_files(large, manifest)[path.name] == NOW


@pytest.mark.parametrize("keep_time", [False, True])
def test_damage_in_a_large_file_is_found(large, keep_time):
    manifest, path = read_manifest(large), weights(large)
    verify_files(large, manifest)
    damage(path, keep_time=keep_time)
    with pytest.raises(UhdError, match=f"{path.name} was altered"):
        verify_files(large, manifest)


@pytest.mark.parametrize("content", ["{", "[]", '{"1:2": 3}', None])
def test_a_cache_that_cannot_be_read_is_an_empty_one(large, tmp_path, content):
    verify_files(large, read_manifest(large))
    path = tmp_path / "cache" / "verified.json"
    assert json.loads(path.read_text())
    if content is None:
        path.unlink()
        path.mkdir()
    else:
        path.write_text(content)
    assert set(verify_files(large, read_manifest(large)).values()) == {NOW}


def test_weights_that_lie_elsewhere_are_named(large, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    name = "language.onnx.data"
    (large / name).rename(tmp_path / "elsewhere" / name)
    (large / name).symlink_to(tmp_path / "elsewhere" / name)
    with pytest.raises(UhdError, match=f"{name} is a link that leads out of it, .*put the file in its place"):
        verify_files(large, read_manifest(large))


def test_inspect_tells_what_is_verified(large, call):
    shown = [call("inspect", large, "--json") for _ in range(2)]
    before, after = (json.loads(done.stdout)["verified"] for done in shown)
    assert set(before.values()) == {NOW} and after[weights(large).name] == BEFORE
    assert "hashed before" in " ".join(call("inspect", large, env={"COLUMNS": "200"}).stdout.split())


def test_a_change_under_an_open_bundle_is_found(large):
    files = OpenFiles(large, read_manifest(large))
    files.check()
    damage(weights(large), keep_time=False)
    with pytest.raises(UhdError, match="was changed while it is open"):
        files.check()
    files = OpenFiles(large, read_manifest(large))
    (large / "tokenizer.json").unlink()
    with pytest.raises(UhdError, match=r"tokenizer\.json was changed"):
        files.check()


def test_a_question_after_a_change_is_refused(large, image_file):
    from uhd_export.runtime import Pipeline

    with Pipeline.open(large, threads=1, max_slices=1) as pipeline:
        pipeline.answer(image_file, "w400", max_new_tokens=1)
        with weights(large).open("r+b") as file:
            file.write(file.read(1))
        with pytest.raises(UhdError, match="was changed while it is open; close it and open it again"):
            pipeline.answer(image_file, "w400", max_new_tokens=1)
