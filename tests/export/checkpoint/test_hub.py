"""Checkpoints of the hub, from a hub on this machine through the real client, in processes of their own."""

import json
import os
import subprocess
import sys

import pytest
from support.fake_hub import fake_hub

from uhd_export.checkpoint.hub import commit_of
from uhd_export.checkpoint.source import EMBEDDED

ID = "acme/nano"
OLD, NEW = "0" * 39 + "1", "0" * 39 + "2"
FILES = {path.relative_to(EMBEDDED).as_posix(): path for path in EMBEDDED.rglob("*") if path.is_file()}
LOCATE = "import sys; from uhd_export.checkpoint.source import source_folder as f; print(f(*sys.argv[1:]))"


@pytest.fixture
def hub(tmp_path):
    other = tmp_path / "config.json"
    other.write_text(json.dumps(json.loads((EMBEDDED / "config.json").read_text()) | {"use_cache": False}))
    with fake_hub() as hub:
        hub.add(ID, OLD, FILES, "v1")
        hub.add(ID, NEW, {**FILES, "config.json": other, "notes.txt": other}, "main")
        yield hub


@pytest.fixture
def python(hub, tmp_path):
    """Run Python with arguments where this hub is the hub; what it printed, its errors, its exit status."""

    def run(*arguments, **environment):
        own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        own |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_ETAG_TIMEOUT": "60", "NO_PROXY": "127.0.0.1"}
        command = [sys.executable, *(str(argument) for argument in arguments)]
        # Libraries that another test imported may have set where the cache is.
        rest = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        done = subprocess.run(command, env=rest | own | environment, capture_output=True, text=True)
        return done.stdout.strip(), done.stderr, done.returncode

    return run


def test_a_revision_is_a_branch_a_tag_or_a_commit(python, hub):
    for arguments, commit in (((), NEW), (("v1",), OLD), ((NEW,), NEW)):
        folder, errors, code = python("-c", LOCATE, ID, *arguments)
        assert (code, errors) == (0, "")
        assert folder.endswith(f"snapshots/{commit}")
    assert hub.fetched.count("model.safetensors") == 1, "the same file is fetched once"
    assert "notes.txt" not in hub.fetched


def test_what_is_in_the_cache_needs_no_hub(python):
    python("-c", LOCATE, ID)
    for gone in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        folder, _, code = python("-c", LOCATE, ID, **gone)
        assert code == 0 and folder.endswith(NEW)
    _, errors, code = python("-c", LOCATE, ID, "v1", HF_HUB_OFFLINE="1")
    assert code == 1 and "the hub cannot provide it" in errors


def test_no_room_is_said_before_anything_is_fetched(python, hub, tmp_path):
    hub.sizes["model.safetensors"] = 10**18
    _, errors, code = python("-m", "uhd_export", "build", ID, "-o", tmp_path / "out")
    assert code == 2 and len(errors.splitlines()) == 1
    assert errors.startswith(f"error: checkpoint {ID}: 1000000000.00 GB are to be downloaded to ")
    assert errors.endswith("GB are free; make room, or set HF_HOME to a folder on another disk\n")
    assert hub.fetched == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((ID, "--revision", "v9"), f"--revision v9: {ID} has none of this name on the hub; pass a branch, "),
        (("acme/none",), "checkpoint acme/none: no such folder, and the hub cannot provide it (404 "),
        (("nano", "--revision", "v1"), "--revision v1: nano comes with the program; leave it out"),
        ((EMBEDDED, "--revision", "v1"), f"--revision v1: checkpoint {EMBEDDED} is a folder; leave it out"),
    ],
)
def test_what_is_not_there_is_one_line(python, tmp_path, arguments, line):
    _, errors, code = python("-m", "uhd_export", "build", *arguments, "-o", tmp_path / "out")
    assert code == 2 and len(errors.splitlines()) == 1 and errors.startswith(f"error: {line}"), errors


@pytest.mark.slow
def test_the_bundle_records_the_commit(python, hub, tmp_path):
    bundle = tmp_path / "bundle"
    build = ("-m", "uhd_export", "build", ID, "--revision", "v1", "-o", bundle, "--no-verify")
    _, errors, code = python(*build)
    assert code == 0, errors
    source = json.loads((bundle / "manifest.json").read_text())["source"]
    assert (source["id"], source["revision"]) == (ID, OLD)
    shown, _, _ = python("-m", "uhd_export", "inspect", bundle)
    assert f"{ID} at {OLD[:12]}" in shown
    # The other commit's config.json differs: what is measured against is the recorded one's.
    python("-c", LOCATE, ID)
    checked, errors, code = python("-m", "uhd_export", "check", bundle, HF_HUB_OFFLINE="1")
    assert code == 0 and "not measured" not in checked and "vision, relative error" in checked, (
        checked + errors
    )


def test_only_a_snapshot_of_the_cache_has_a_commit(tmp_path):
    assert commit_of(tmp_path / "snapshots" / NEW) == NEW
    assert commit_of(tmp_path / "snapshots" / "main") is None
    assert commit_of(tmp_path / NEW) is None
