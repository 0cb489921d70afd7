"""The Hugging Face hub: a checkpoint by its id and revision, downloaded into the hub's cache."""

import re
import shutil
import sys
from pathlib import Path
from typing import Any

from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.units import format_bytes

_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def download(name: str, patterns: list[str], revision: str | None = None) -> Path:
    """The local folder of hub id `name` at `revision` (a branch, tag or commit; None: its main branch).

    It holds the files that match `patterns`. What the cache has is not fetched again, and where the hub is
    out of reach, a whole download in the cache will do. Raises UhdError, before anything is fetched where it
    would not fit on the disk.
    """
    if not _ID.fullmatch(name):
        raise UhdError(f"checkpoint {name[:200]}: no such folder, and not a Hugging Face hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        _require_space(name, patterns, revision)
        bars = None if sys.stderr.isatty() else _no_bars()
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, tqdm_class=bars))
    except RevisionNotFoundError:
        raise UhdError(
            f"--revision {revision}: {name} has none of this name on the hub; pass a branch, tag or commit"
        ) from None
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UhdError(
            f"checkpoint {name}: no such folder, and the hub cannot provide it ({reason}); "
            "check the name, log in with `hf auth login`, or download it and pass the folder"
        ) from None


def cached(name: str, revision: str | None) -> Path | None:
    """The folder of `name` at `revision` where the cache holds it; nothing is downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def commit_of(folder: Path) -> str | None:
    """The commit that `folder` is a snapshot of, where it is one of the hub's cache."""
    snapshot = folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name)
    return folder.name if snapshot else None


def _require_space(name: str, patterns: list[str], revision: str | None) -> None:
    """Raise UhdError where what is to be fetched does not fit on the cache's disk."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import DryRunError

    try:
        files = snapshot_download(
            name, revision=revision, allow_patterns=patterns, dry_run=True, tqdm_class=_no_bars()
        )
    except DryRunError:  # out of reach: what is in the cache may do, or the download says what is wrong
        return
    needed = sum(file.file_size or 0 for file in files if file.will_download)
    cache = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
    if needed > free:
        raise UhdError(
            f"checkpoint {name}: {format_bytes(needed)} are to be downloaded to {cache} but "
            f"{format_bytes(free)} are free; make room, or set HF_HOME to a folder on another disk"
        )


def _no_bars() -> type:
    """What stands for the hub's bars where nobody sees them, or nothing is fetched."""
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **{**settings, "disable": True})

    return Silent
