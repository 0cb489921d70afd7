"""The report of nano as it comes out, docs/report.html, and its pictures, report.png and report-dark.png.

    python benchmarks/report.py                      # build, profile, take pictures
    python benchmarks/report.py --page report.html   # pictures of a page that is there already

On a machine that does nothing else. Needs Chromium (apt-get install chromium) and Playwright.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
WIDTH, HEIGHT = 1360, 1090  # two columns of charts, down to where the tables begin


def profile_nano(page: Path) -> None:
    """Build nano and write its report to `page`."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "nano-bundle"
        for command in (["build", "nano", "-o", bundle], ["profile", bundle, "--html", page]):
            subprocess.run([sys.executable, "-m", "uhd_export", *map(str, command)], check=True)


def take_pictures(page: Path, folder: Path) -> None:
    """What readers in light and in dark see of `page`, as report.png and report-dark.png in `folder`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for scheme, name in (("light", "report.png"), ("dark", "report-dark.png")):
            sheet = browser.new_page(color_scheme=scheme, viewport={"width": WIDTH, "height": HEIGHT})
            complaints = []
            sheet.on("console", lambda message, to=complaints: to.append(message.text))
            sheet.on("request", lambda request, to=complaints: to.append(request.url))
            sheet.goto(page.resolve().as_uri())
            assert complaints == [page.resolve().as_uri()], f"fetches or complains: {complaints}"
            sheet.screenshot(path=folder / name)
            print(f"written: {folder / name}")
        browser.close()


def main() -> None:
    """Write the page and its pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=DOCS, help="folder to write to (default: docs/)")
    parser.add_argument("--page", type=Path, help="take pictures of this page; nothing is measured")
    arguments = parser.parse_args()
    page = arguments.page or arguments.out / "report.html"
    if arguments.page is None:
        profile_nano(page)
    take_pictures(page, arguments.out)


if __name__ == "__main__":
    main()
