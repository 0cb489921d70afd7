"""What is in a folder."""

from pathlib import Path


def leftovers(folder: Path) -> list[str]:
    """The names in `folder`, hidden ones too, in order."""
    return sorted(path.name for path in folder.iterdir())
