"""Integrity: the files of a bundle are the ones its manifest lists, byte for byte."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from uhd_export.runtime.bundle.manifest import MANIFEST, Manifest
from uhd_export.runtime.errors import UhdError

# Files up to this size are hashed whenever a bundle is opened (well under a second each); larger ones
# only by `uhd-export check`, because hashing 27 GB of weights takes longer than answering.
HASH_AT_OPEN = 256 * 2**20
_CHUNK = 2**20


def verify_files(
    folder: str | Path,
    manifest: Manifest,
    *,
    hash_limit: int | None = HASH_AT_OPEN,
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Compare the files in `folder` with `manifest`: names, sizes, and SHA-256 up to `hash_limit` bytes.

    `hash_limit` None hashes everything; `on_bytes(n)` is told of each n bytes hashed. Names that
    begin with a dot belong to the operating system and are passed over.
    Raises UhdError naming the file that is missing, unknown, truncated or altered.
    """
    folder = Path(folder)
    present = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    for name in sorted(present - set(manifest.files) - {MANIFEST}):
        raise UhdError(f"bundle {folder}: {name} is not listed in {MANIFEST}; remove it")
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise UhdError(f"bundle {folder}: {name} is missing; copy it again or rebuild")
        size = path.stat().st_size
        if size != record.bytes:
            raise UhdError(
                f"bundle {folder}: {name} has {size} bytes instead of {record.bytes}; "
                "copy it again or rebuild"
            )
        if (hash_limit is None or size <= hash_limit) and hash_file(path, on_bytes) != record.sha256:
            raise UhdError(f"bundle {folder}: {name} was altered (SHA-256 differs); copy it again or rebuild")


def hash_file(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file in hexadecimal, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            if on_bytes is not None:
                on_bytes(len(chunk))
    return digest.hexdigest()
