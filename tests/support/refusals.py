"""Errors as a user meets them."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from uhd_export.runtime.errors import UhdError


@contextmanager
def one_line_error(match: str) -> Iterator[None]:
    """What runs inside must raise a UhdError of one line that matches `match`."""
    with pytest.raises(UhdError, match=match) as caught:
        yield
    assert "\n" not in str(caught.value)
