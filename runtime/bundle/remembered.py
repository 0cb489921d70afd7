"""What large files were found to be, so that they are hashed once: in the user's cache folder, by inode."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Self

from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.files import cache_folder, write_file
from uhd_export.runtime.json_files import read_json

_MOST = 500


class Remembered:
    """SHA-256 by file, and the state in which a file had it: size, mtime and ctime, in nanoseconds.

    ctime tells also of a change whose mtime was set back. The state is the one before hashing, so that a
    change meanwhile is one that came after. A cache that cannot be read or written is an empty one.
    """

    def __init__(self, path: Path, entries: dict[str, list[object]]) -> None:
        self._path, self._entries, self._changed = path, entries, False

    @classmethod
    def load(cls) -> Self:
        """What this user's cache holds."""
        path = cache_folder() / "verified.json"
        try:
            found = read_json(path)
        except (OSError, UhdError):
            found = {}
        return cls(path, found if isinstance(found, dict) else {})

    def knows(self, status: os.stat_result, sha256: str) -> bool:
        """Whether the file of `status` had this `sha256`, and was not changed since."""
        return self._entries.get(_key(status)) == [*_state(status), sha256]

    def add(self, status: os.stat_result, sha256: str) -> None:
        """The file had this `sha256`, hashed after `status` was taken."""
        self._entries.pop(_key(status), None)
        self._entries[_key(status)] = [*_state(status), sha256]
        self._changed = True

    def save(self) -> None:
        """Write what was added, the oldest left out where there are too many."""
        if self._changed:
            newest = dict(list(self._entries.items())[-_MOST:])
            with suppress(OSError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_file(self._path, json.dumps(newest))


def _key(status: os.stat_result) -> str:
    return f"{status.st_dev}:{status.st_ino}"


def _state(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
