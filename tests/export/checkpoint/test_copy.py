"""What a checkpoint's copy holds is the checkpoint's own."""

import pytest

from uhd_export.checkpoint.copy import copy_own
from uhd_export.runtime.errors import UhdError


def test_links_out_of_a_checkpoint_are_not_followed(tmp_path):
    (tmp_path / "secret").write_text("secret")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "own.json").write_text("own")
    (folder / "alias.json").symlink_to(folder / "own.json")
    for name in ("own.json", "alias.json"):
        copy_own(folder, name, tmp_path / "copy")
        assert (tmp_path / "copy").read_text() == "own"
    for target in (tmp_path / "secret", "../secret", "/etc/hostname"):
        (folder / "tokenizer.json").unlink(missing_ok=True)
        (folder / "tokenizer.json").symlink_to(target)
        with pytest.raises(UhdError, match=r"tokenizer\.json is a link that leads out of it"):
            copy_own(folder, "tokenizer.json", tmp_path / "copy")
    assert (tmp_path / "copy").read_text() == "own"


def test_links_of_the_hubs_cache_are(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (tmp_path / "models--a--b" / "blobs" / "5678").write_text("blob")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/5678")
    copy_own(snapshot, "tokenizer.json", tmp_path / "copy")
    assert (tmp_path / "copy").read_text() == "blob"
