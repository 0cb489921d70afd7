"""Chromium for tests of pages: the machine's, or the one that Playwright installed; see `make browser`."""

import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

_FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


@contextmanager
def chromium():
    """A browser; where there is none, the test is skipped."""
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        path = shutil.which("chromium")
        if path is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("needs Chromium: make browser")
        browser = playwright.chromium.launch(executable_path=path, args=_FLAGS)
        yield browser
        browser.close()
