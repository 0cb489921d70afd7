"""The embedded model: a few megabytes in the official format, trained to read small print."""

from pathlib import Path


def checkpoint_path() -> Path:
    """The folder of the embedded checkpoint, which `load_model` takes."""
    return Path(__file__).parent / "checkpoint"
