"""The console that tables are printed to."""

import os

from rich.console import Console

_WIDE = 1000


def output() -> Console:
    """Standard output: as wide as the terminal, and where it is none as wide as what is printed.

    A pipe has no columns; 80, which rich takes for it, would break lines that a program reads. COLUMNS is
    heeded.
    """
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDE
    return console
