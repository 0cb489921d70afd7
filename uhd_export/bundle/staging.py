"""All or nothing: a folder appears under its name only when it is complete."""

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from uhd_export.checkpoint.fields import optional, read_json
from uhd_export.runtime.bundle.manifest import MANIFEST
from uhd_export.runtime.errors import UhdError, is_disk_full
from uhd_export.runtime.files import sync
from uhd_export.runtime.units import format_bytes


@contextmanager
def staged_folder(out: Path, *, force: bool = False, needed: int = 0) -> Iterator[Path]:
    """A hidden folder beside `out` to write into; it becomes `out` when the block ends without an error.

    After any error, Ctrl-C included, it is removed and `out` is as it was. An existing `out` is
    replaced only with `force`, and only where it is a bundle and nothing else, or empty; where it is a
    link, what it leads to is replaced. `needed` is the free space to ask for before anything is
    written, in bytes.
    Raises UhdError where `out` is in the way, the place is not writable or the disk is full.
    """
    out = Path(out).resolve()
    refuse_existing(out, force)
    staging, made = None, []
    try:
        with output_errors(out):
            made = [parent for parent in out.parents if not parent.exists()]
            out.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(out.parent).free
            if needed > free:
                raise UhdError(
                    f"output {out}: about {format_bytes(needed)} are needed but {format_bytes(free)} are "
                    "free; make room or choose another disk"
                )
            staging = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
            staging.mkdir()
            yield staging
            _move(staging, out)
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
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
        if error.filename is not None and Path(error.filename).is_relative_to(out.parent):
            raise UhdError(f"output {out}: cannot be written ({error.strerror}); choose another") from None
        raise


def refuse_existing(out: Path, force: bool) -> None:
    """Raise UhdError where `out` is in the way; see `staged_folder`."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if not out.exists():
        return
    if not force:
        raise UhdError(f"output {out}: exists already; use --force to replace it, or choose another")
    if not (out / MANIFEST).is_file():
        raise UhdError(f"output {out}: exists and is no bundle, so --force does not replace it")
    files = optional(read_json(out / MANIFEST), "files", dict, {}, str(out / MANIFEST))
    known = {MANIFEST, *files}
    names = sorted(path.name for path in out.iterdir())
    others = [name for name in names if name not in known and not name.startswith(".")]
    if others:
        raise UhdError(
            f"output {out}: holds {others[0]}, which is not of the bundle and --force would delete; "
            "move it away, or choose another"
        )


def _move(staging: Path, out: Path) -> None:
    """Rename `staging` to `out`; an old bundle there steps aside first, and back if that fails."""
    for path in (*staging.iterdir(), staging):
        sync(path)
    if not out.exists():
        staging.rename(out)
        sync(out.parent)
        return
    old = staging.with_name(staging.name + ".old")
    out.rename(old)
    try:
        staging.rename(out)
    except BaseException:
        old.rename(out)
        raise
    sync(out.parent)
    shutil.rmtree(old)
