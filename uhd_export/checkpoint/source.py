"""Where a checkpoint is: the embedded one, a folder, or a Hugging Face hub id."""

import re
from pathlib import Path

from uhd_export.runtime.errors import UhdError

NANO = "nano"
EMBEDDED = Path(__file__).parent.parent / "nano" / "checkpoint"
"""The folder of the embedded checkpoint."""
HUB_PATTERNS = ["*.json", "*.safetensors", "tokenizer.model", "merges.txt"]
_TORCH_PATTERN = "pytorch_model*.bin"


def source_folder(source: str | Path) -> Path:
    """The local folder of `source`: "nano", a folder, or a hub id (downloaded and cached)."""
    return EMBEDDED if str(source) == NANO else locate(source)


def locate(source: str | Path, *, weights: bool = True) -> Path:
    """The local folder of `source`, a folder or a Hugging Face hub id (downloaded and cached)."""
    path = Path(source)
    try:
        if path.is_dir():
            return whole_folder(path)
        exists = path.exists()
    except (OSError, ValueError) as error:  # too long, or a zero byte
        raise UhdError(f"checkpoint {str(source)[:80]!r}: is no path ({error})") from None
    if exists:
        raise UhdError(f"checkpoint {source}: is a file; pass the folder that holds it")
    folder = download(str(source), HUB_PATTERNS if weights else ["*.json"])
    if weights and not any(folder.glob("*.safetensors")):
        folder = download(str(source), [*HUB_PATTERNS, _TORCH_PATTERN])
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


def download(name: str, patterns: list[str]) -> Path:
    """The local folder of hub id `name`, with the files that match `patterns`. Raises UhdError."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise UhdError(f"checkpoint {name[:200]}: no such folder, and not a Hugging Face hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UhdError(
            f"checkpoint {name}: no such folder, and the hub cannot provide it ({reason}); "
            "check the name, log in with `hf auth login`, or download it and pass the folder"
        ) from None
