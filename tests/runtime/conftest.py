"""Fixtures of the runtime's tests."""

import pytest


@pytest.fixture(scope="module")
def pipeline(golden_bundle):
    """The golden bundle, opened once for a file of tests."""
    from uhd_export.runtime import Pipeline

    with Pipeline.open(golden_bundle, threads=1) as opened:
        yield opened
