"""Fixtures of the runtime's tests."""

import pytest
from support.browser import chromium


@pytest.fixture(scope="module")
def pipeline(golden_bundle):
    """The golden bundle, opened once for a file of tests."""
    from uhd_export.runtime import Pipeline

    with Pipeline.open(golden_bundle, threads=1) as opened:
        yield opened


@pytest.fixture
def browser():
    """Chromium."""
    with chromium() as opened:
        yield opened
