"""The documentation site names every document, and nothing that a reader's browser would fetch."""

import json
import re

from support.source_tree import ROOT, modules

SETTINGS = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
PAGES = re.findall(r": ([\w-]+\.(?:md|ipynb))$", SETTINGS, flags=re.M)


def test_every_document_has_its_place():
    documents = {path.name for kind in ("*.md", "*.ipynb") for path in (ROOT / "docs").glob(kind)}
    assert documents == set(PAGES) and len(PAGES) == len(set(PAGES))


def test_no_font_is_fetched():
    assert re.search(r"^  font: false$", SETTINGS, flags=re.M)


def test_notebooks_are_run_whenever_the_site_is_made():
    """None of what they show is from before: it is not in the repository, and not kept between two sites."""
    for line in ("execute: true", "allow_errors: false", "cache: false"):
        assert re.search(rf"^      {line}$", SETTINGS, flags=re.M)
    for path in (ROOT / "docs").glob("*.ipynb"):
        code = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        assert len(code) > 5 and all(not cell["outputs"] and not cell["execution_count"] for cell in code)


def test_links_that_lead_nowhere_fail():
    for line in ("strict: true", "    not_found: warn", "    unrecognized_links: warn", "    anchors: warn"):
        assert re.search(rf"^{line}$", SETTINGS, flags=re.M)


def test_the_python_pages_name_what_exists():
    named = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), flags=re.M)
    assert len(named) > 6
    for name in named:
        module, _, attribute = name.rpartition(".")
        text = modules()[module].read_text(encoding="utf-8")
        assert re.search(rf"^(class|def) {attribute}\b", text, flags=re.M), name


def test_studies_in_the_command_are_those_there_are():
    from uhd_export.cli.profile import STUDIES
    from uhd_export.study import rows

    assert STUDIES == rows.STUDIES
