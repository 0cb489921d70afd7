"""Which device an engine runs on: "cpu", "cuda", or "cuda:1" for another GPU than the first."""

import re
from typing import NamedTuple

from uhd_export.runtime.errors import UhdError


class Device(NamedTuple):
    """A kind of device ("cpu" or "cuda"), and which of them."""

    kind: str
    number: int = 0

    def __str__(self) -> str:
        return f"{self.kind}:{self.number}" if self.number else self.kind


def parse_device(text: str) -> Device:
    """The device called `text`. Raises UhdError for another name."""
    found = re.fullmatch(r"(cpu|cuda)(?::(\d+))?", text)
    if not found or (found[1] == "cpu" and int(found[2] or 0)):
        raise UhdError(f"device {text!r}: unknown; use cpu, cuda, or cuda:1 for the second GPU")
    return Device(found[1], int(found[2] or 0))
