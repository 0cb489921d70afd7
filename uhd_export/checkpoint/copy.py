"""Copying a checkpoint's files, and nothing that merely looks like one of them."""

import shutil
from pathlib import Path

from uhd_export.runtime.errors import UhdError


def copy_own(folder: Path, name: str | Path, target: Path) -> None:
    """Copy the file `name` of the checkpoint in `folder`. Raises UhdError as `own_file` does."""
    shutil.copyfile(own_file(folder, name), target)


def own_file(folder: Path, name: str | Path) -> Path:
    """The file `name` of the checkpoint in `folder`, where it may be copied.

    A link may lead anywhere on this machine, and the copy goes to others: one that leaves the folder is not
    followed. The hub's cache consists of links, to the blobs beside its snapshots. Raises UhdError.
    """
    source = (folder / name).resolve()
    home = folder.resolve()
    if home.parent.name == "snapshots":
        home = home.parent.parent
    if not source.is_relative_to(home):
        raise UhdError(
            f"checkpoint {folder}: {name} is a link that leads out of it, to {source}; put the file in "
            "its place"
        )
    return source
