"""Numbers as people read them."""


def format_bytes(count: int) -> str:
    """`count` bytes in the decimal unit that suits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1e3:.1f} kB"
