"""All or nothing: a folder appears under its name only when it is complete.

It is written beside its place, under `.NAME.uhd-partial`; what it replaces stands aside as `.NAME.uhd-old`. A
process that is killed leaves these; the next one to write the same output rolls back and removes them.
"""

import ctypes
import errno
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from uhd_export.bundle.exclusive import exclusive
from uhd_export.runtime.bundle.manifest import MANIFEST, bundle_files
from uhd_export.runtime.errors import UhdError, is_disk_full
from uhd_export.runtime.files import sync
from uhd_export.runtime.units import format_bytes

# What a file manager leaves in every folder that it shows; it goes with the folder.
_LEFT_BY_SYSTEM = {".DS_Store"}
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def staged_folder(out: Path, *, force: bool = False, needed: int = 0) -> Iterator[Path]:
    """A hidden folder beside `out` to write into; it becomes `out` when the block ends without an error.

    After any error, Ctrl-C included, it is removed and `out` is as it was. An existing `out` is
    replaced only with `force`, and only where it is a bundle and nothing else, or empty; where it is a
    link, what it leads to is replaced. `needed` is the free space to ask for before anything is
    written, in bytes.
    Raises UhdError where `out` is in the way or being written, the place is not writable or the disk full.
    """
    out = Path(out).resolve()
    refuse_existing(out, force)
    with output_errors(out), parents_of(out), exclusive(out):
        staging, old = (out.with_name(f".{out.name}.uhd-{what}") for what in ("partial", "old"))
        _recover(out, staging, old)
        refuse_existing(out, force)
        require_room(out, needed)
        try:
            staging.mkdir()
            yield staging
            _move(staging, out, old)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def require_room(out: Path, needed: int) -> None:
    """Raise UhdError where the disk that `out` is to lie on has less than `needed` bytes."""
    there = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise UhdError(
            f"output {out}: about {format_bytes(needed)} are needed but {format_bytes(free)} are "
            "free; make room or choose another disk"
        )


@contextmanager
def parents_of(out: Path) -> Iterator[None]:
    """The folders above `out` are made where they are missing, and go again where nothing came into them."""
    made = [parent for parent in out.parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        with suppress(OSError):  # they hold `out` where all went well
            for parent in made:
                parent.rmdir()


@contextmanager
def output_errors(out: Path) -> Iterator[None]:
    """Turn what the operating system says while `out` is written, or something beside it, into a UhdError."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            reason = error.strerror or str(error)
            raise UhdError(
                f"output {out}: the disk is full ({reason}); make room or choose another disk"
            ) from None
        place = error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)
        if place and error.filename is not None and Path(error.filename).is_relative_to(out.parent):
            raise UhdError(f"output {out}: cannot be written ({error.strerror}); choose another") from None
        raise


def refuse_existing(out: Path, force: bool) -> None:
    """Raise UhdError where `out` is in the way; see `staged_folder`."""
    if os.path.ismount(os.path.realpath(out)):  # whose name nothing can change, empty or not
        raise UhdError(f"output {out}: is a mount point; choose a folder inside it")
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return
    if not force:
        raise UhdError(f"output {out}: exists already; use --force to replace it, or choose another")
    _own_files(out, out)


def _own_files(folder: Path, out: Path) -> list[Path]:
    """All files of the bundle in `folder`. Raises UhdError, about `out`, where it is none or holds more."""
    try:
        names = bundle_files(folder)
    except UhdError as error:
        raise UhdError(
            f"output {out}: exists and is no bundle, so --force does not replace it ({error})"
        ) from None
    paths = sorted(folder.iterdir())
    for path in paths:
        own = path.name in names | _LEFT_BY_SYSTEM
        if not own or not (path.is_symlink() or stat.S_ISREG(path.stat().st_mode)):
            raise UhdError(
                f"output {out}: holds {path.name}, which is not of the bundle and --force would delete; "
                "move it away, or choose another"
            )
    return paths


def _recover(out: Path, staging: Path, old: Path) -> None:
    """Undo what a killed process left beside `out`: a bundle that stood aside goes back, halves go."""
    if os.path.lexists(old):
        if os.path.lexists(out):
            _delete_bundle(old)
        else:
            old.rename(out)
    if os.path.lexists(staging):
        shutil.rmtree(staging)


def _move(staging: Path, out: Path, old: Path) -> None:
    """`staging` becomes `out`; an old bundle there steps aside first, and back if that fails.

    Where the system can, both change names in one step, so that at no moment there is no bundle.
    """
    for path in (*staging.rglob("*"), staging):
        sync(path)
    if not out.exists() or not any(out.iterdir()):
        staging.rename(out)
        sync(out.parent)
        return
    _own_files(out, out)  # it may have got something meanwhile
    if _exchange(staging, out):
        staging.rename(old)
    else:
        out.rename(old)
        try:
            staging.rename(out)
        except BaseException:
            old.rename(out)
            raise
    sync(out.parent)
    _delete_bundle(old)


def _delete_bundle(old: Path) -> None:
    """Delete the bundle in `old`, and nothing that came into it from elsewhere.

    Its manifest goes last: where this is cut short, the next one still knows what belongs to the bundle.
    """
    if any(old.iterdir()):
        for path in sorted(_own_files(old, old), key=lambda path: path.name == MANIFEST):
            path.unlink()
    old.rmdir()


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    sys.audit("os.rename", one, other, -1, -1)  # as for any other rename
    done = rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return bool(done == 0)
