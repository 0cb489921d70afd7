"""The streams that a command writes to."""

import io
import sys


def print_anything() -> None:
    """From now on characters that a terminal's encoding lacks are printed as escapes; nothing raises."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
