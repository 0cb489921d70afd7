"""What the plugins inside an engine are made of."""

import hashlib
from pathlib import Path

import plugins


def plugin_fingerprint() -> str:
    """SHA-256 over the source of all plugins and their kernels, which engines carry inside."""
    digest = hashlib.sha256()
    folder = Path(plugins.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
