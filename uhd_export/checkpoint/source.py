"""Where a checkpoint is: the embedded one, a folder, or a Hugging Face hub id."""

from pathlib import Path

from uhd_export.checkpoint.hub import download
from uhd_export.runtime.errors import UhdError

NANO = "nano"
EMBEDDED = Path(__file__).parent.parent / "nano" / "checkpoint"
"""The folder of the embedded checkpoint."""
HUB_PATTERNS = ["*.json", "*.safetensors", "tokenizer.model", "merges.txt"]
_TORCH_PATTERN = "pytorch_model*.bin"


def source_folder(source: str | Path, revision: str | None = None) -> Path:
    """The local folder of `source`: "nano", a folder, or a hub id (downloaded and cached) at `revision`."""
    if str(source) != NANO:
        return locate(source, revision=revision)
    if revision is not None:
        raise UhdError(f"--revision {revision}: nano comes with the program; leave it out")
    return EMBEDDED


def locate(source: str | Path, *, weights: bool = True, revision: str | None = None) -> Path:
    """The local folder of `source`, a folder or a hub id (downloaded and cached) at `revision`."""
    path = Path(source)
    try:
        if path.is_dir():
            if revision is not None:
                raise UhdError(f"--revision {revision}: checkpoint {source} is a folder; leave it out")
            return whole_folder(path)
        exists = path.exists()
    except (OSError, ValueError) as error:  # too long, or a zero byte
        raise UhdError(f"checkpoint {str(source)[:80]!r}: is no path ({error})") from None
    if exists:
        raise UhdError(f"checkpoint {source}: is a file; pass the folder that holds it")
    folder = download(str(source), HUB_PATTERNS if weights else ["*.json"], revision)
    if weights and not any(folder.glob("*.safetensors")):
        folder = download(str(source), [*HUB_PATTERNS, _TORCH_PATTERN], revision)
    return folder


def whole_folder(folder: Path) -> Path:
    """`folder`, or its only snapshot where it is one of the hub's cache (models--OWNER--NAME)."""
    if (folder / "config.json").exists():
        return folder
    snapshots = [path.parent for path in sorted(folder.glob("snapshots/*/config.json"))]
    if len(snapshots) > 1:
        raise UhdError(
            f"checkpoint {folder}: holds {len(snapshots)} snapshots; pass the folder of one of them"
        )
    return snapshots[0] if snapshots else folder
