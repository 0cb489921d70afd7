"""Text of others on a terminal: shown, never obeyed, whatever the terminal can show."""

from rich.markup import escape

from uhd_export.runtime.errors import printable


def cell(text: object) -> str:
    """`text` for one of rich's tables or lines: neither markup nor control characters count."""
    return escape(printable(str(text)))
