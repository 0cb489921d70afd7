"""Where a checkpoint is: the embedded one, a folder, or a Hugging Face hub id."""

import re
from pathlib import Path

from uhd_export.runtime.errors import UhdError

NANO = "nano"
EMBEDDED = Path(__file__).parent.parent / "nano" / "checkpoint"
"""The folder of the embedded checkpoint."""
HUB_PATTERNS = ["*.json", "*.safetensors", "tokenizer.model", "merges.txt"]


def source_folder(source: str | Path) -> Path:
    """The local folder of `source`: "nano", a folder, or a hub id (downloaded and cached)."""
    return EMBEDDED if str(source) == NANO else locate(source)


def locate(source: str | Path, *, weights: bool = True) -> Path:
    """The local folder of `source`, a folder or a Hugging Face hub id (downloaded and cached)."""
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise UhdError(f"checkpoint {source}: is a file; pass the folder that holds it")
    return download(str(source), HUB_PATTERNS if weights else ["*.json"])


def download(name: str, patterns: list[str]) -> Path:
    """The local folder of hub id `name`, with the files that match `patterns`. Raises UhdError."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UhdError(f"checkpoint {name}: no such folder, and not a Hugging Face hub id (owner/name)")
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
