"""Integrity: the files of a bundle are the ones its manifest lists, byte for byte, while it is open too."""

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

from uhd_export.runtime.bundle.manifest import MANIFEST, Manifest
from uhd_export.runtime.bundle.remembered import Remembered
from uhd_export.runtime.errors import UhdError

# Files up to this size are hashed whenever a bundle is opened (well under a second each). Larger ones are
# hashed once, and again when they were changed: 27 GB of weights take longer than an answer.
HASH_AT_OPEN = 256 * 2**20
NOW, BEFORE = "hashed now", "hashed before, not changed since"
_CHUNK = 2**20


def verify_files(
    folder: str | Path,
    manifest: Manifest,
    *,
    remembered: bool = True,
    on_bytes: Callable[[int], None] | None = None,
) -> dict[str, str]:
    """Compare the files in `folder` with `manifest`: names, sizes, SHA-256. How each was verified, by name.

    With `remembered`, a file over HASH_AT_OPEN that was hashed before counts as it was then, unless its
    inode, size, mtime or ctime changed: that is NOW or BEFORE. `on_bytes(n)` is told of each n bytes hashed.
    Names that begin with a dot belong to the operating system and are passed over.
    Raises UhdError naming the file that is missing, unknown, truncated or altered.
    """
    folder = Path(folder)
    present = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    for name in sorted(present - set(manifest.files) - {MANIFEST}):
        raise UhdError(f"bundle {folder}: {name} is not listed in {MANIFEST}; remove it")
    memory, how = Remembered.load(), {}
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise UhdError(f"bundle {folder}: {name} is missing; copy it again or rebuild")
        if name.endswith(".data") and path.resolve().parent != folder.resolve():
            raise UhdError(
                f"bundle {folder}: {name} is a link that leads out of it, which ONNX Runtime "
                "does not follow; put the file in its place"
            )
        status = path.stat()
        if status.st_size != record.bytes:
            raise UhdError(
                f"bundle {folder}: {name} has {status.st_size} bytes instead of {record.bytes}; "
                "copy it again or rebuild"
            )
        large = status.st_size > HASH_AT_OPEN
        how[name] = BEFORE
        if not (remembered and large and memory.knows(status, record.sha256)):
            how[name] = NOW
            if hash_file(path, on_bytes) != record.sha256:
                raise UhdError(
                    f"bundle {folder}: {name} was altered (SHA-256 differs); copy it again or rebuild"
                )
            if large:
                memory.add(status, record.sha256)
    memory.save()
    return how


class OpenFiles:
    """The files of an open bundle as they were when it was opened.

    Weights are mapped into memory: where a file is cut short meanwhile, the system ends the process (SIGBUS)
    at the first access beyond its end, which no program can catch. `check` finds a change before that.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder = folder
        self._states = {folder / name: _state(folder / name) for name in manifest.files}

    def check(self) -> None:
        """Raise UhdError where a file was changed, replaced or removed since."""
        for path, state in self._states.items():
            if _state(path) != state:
                raise UhdError(
                    f"bundle {self._folder}: {path.name} was changed while it is open; close it and open it "
                    "again"
                )


def _state(path: Path) -> tuple[int, ...] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def hash_file(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file in hexadecimal, in pieces of 1 MiB. Raises UhdError where it is no plain file."""
    digest = hashlib.sha256()
    if not stat.S_ISREG(path.stat().st_mode):
        raise UhdError(f"{path}: is no plain file")
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            if on_bytes is not None:
                on_bytes(len(chunk))
    return digest.hexdigest()
