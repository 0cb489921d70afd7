"""Measurements that may fail, each by itself: what one of them meets must not cost the others' figures."""

import sys
import traceback
from collections.abc import Callable, Iterator


class Wrong(Exception):
    """A result that differs from its reference: no time is reported for it."""


class Unavailable(Exception):
    """What cannot be measured here, and why."""


def require(what: str, error: float, limit: float) -> float:
    """`error`, or Wrong where it is over `limit` (or not a number)."""
    if not error < limit:
        raise Wrong(f"{what}: relative error {error:.1e}, over the limit of {limit:.0e}")
    return error


def attempt(measure: Callable[[], dict]) -> dict:
    """What `measure` returns, else why it is missing: "not_measured" what is not there, "failed" the rest."""
    try:
        return measure()
    except (Unavailable, ImportError) as reason:
        return {"not_measured": str(reason)}
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"}


def failures(result: object, place: str = "") -> Iterator[str]:
    """The failed attempts in a result, by where they are."""
    items = (
        result.items() if isinstance(result, dict) else enumerate(result) if isinstance(result, list) else ()
    )
    for name, value in items:
        if name == "failed":
            yield f"{place}: {value}"
        yield from failures(value, f"{place}.{name}".lstrip("."))
