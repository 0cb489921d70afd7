"""Where a bundle comes from: its source, and the versions of the tools that made it."""

import importlib.metadata
import platform
from pathlib import Path

from uhd_export.checkpoint.files import weight_sizes
from uhd_export.checkpoint.hub import commit_of
from uhd_export.checkpoint.options import SourceOptions
from uhd_export.checkpoint.source import NANO
from uhd_export.runtime.bundle.integrity import hash_file
from uhd_export.runtime.bundle.manifest import Source

TOOLS = ("uhd-export", "numpy", "onnx", "onnx-ir", "onnxruntime", "safetensors", "tokenizers", "torch")


def describe_source(source: str | Path, folder: Path, release: str, reading: SourceOptions) -> Source:
    """What identifies the checkpoint in `folder`, so that `check` can find it again and know it."""
    return Source(
        id=_lasting(source),
        revision=commit_of(folder),
        config_sha256=hash_file(Path(reading.config) if reading.config else folder / "config.json"),
        weights=weight_sizes(folder),
        release=release,
        config=None if reading.config is None else _lasting(reading.config),
        vision_tower=None if reading.vision_tower is None else _lasting(reading.vision_tower),
        mask=reading.mask,
    )


def tool_versions(*more: str) -> dict[str, str]:
    """Versions of Python and of the distributions in TOOLS and `more`."""
    return {"python": platform.python_version(), **{name: _version(name) for name in (*TOOLS, *more)}}


def _lasting(name: str | Path) -> str:
    """A path made absolute, so that it is found from any folder; "nano" and hub ids as they are."""
    return str(Path(name).absolute()) if str(name) != NANO and Path(name).exists() else str(name)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
