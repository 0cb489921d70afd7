"""What the plugins inside an engine are made of."""

import hashlib
from pathlib import Path

from uhd_export import plugins
from uhd_export.plugins.compile.compiler import triton_version


def plugin_fingerprint() -> str:
    """SHA-256 over the plugins' source and their compiler's version: engines carry the kernels inside."""
    digest = hashlib.sha256(triton_version().encode())
    folder = Path(plugins.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
