"""Numbers as people read and write them."""

import math
import re

from uhd_export.runtime.errors import UhdError


def format_bytes(count: int) -> str:
    """`count` bytes in the decimal unit that suits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1e3:.1f} kB"


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_bytes(text: str) -> int:
    """Bytes of a size such as "8GB", "512 MiB" or "6g". Raises UhdError where it is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?|)b?", text.strip().lower())
    # Less than a byte would be nothing, which reads as not given.
    size = 0.0 if found is None else float(found[1]) * _UNITS[found[2]]
    if not 1 <= size < math.inf:
        raise UhdError(f"size {text!r}: give bytes with a unit, such as 8GB or 512MiB")
    return int(size)
