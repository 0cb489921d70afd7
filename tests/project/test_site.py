"""The documentation site names every document, and nothing that a reader's browser would fetch."""

import re

from support.source_tree import ROOT, modules

SETTINGS = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
PAGES = re.findall(r": ([\w-]+\.md)$", SETTINGS, flags=re.M)


def test_every_document_has_its_place():
    documents = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert documents == set(PAGES) and len(PAGES) == len(set(PAGES))


def test_no_font_is_fetched():
    assert re.search(r"^  font: false$", SETTINGS, flags=re.M)


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
