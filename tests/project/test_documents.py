"""The documents name files that exist, and link to pages that exist."""

import re
import xml.etree.ElementTree as ElementTree

import pytest
from support.source_tree import FOLDERS, ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "uhd_export").rglob("*.md")])
# Paths from the repository's root: `runtime/errors.py`, `tests/golden/`, `docs/model.md`.
NAMED = re.compile(rf"`((?:{'|'.join([*FOLDERS, 'tests', 'benchmarks', 'docs', 'examples'])})/[\w./-]*)`")
LINKED = re.compile(r"\]\((?!https?:)([^)#]+)[^)]*\)")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_named_files_exist(document):
    text = document.read_text(encoding="utf-8")
    missing = [name for name in NAMED.findall(text) if not (ROOT / name).exists()]
    missing += [name for name in LINKED.findall(text) if not (document.parent / name).exists()]
    assert missing == []


def test_names_and_links_are_found():
    text = "`runtime/errors.py`, `tests/golden/` and [a](b.md), [c](https://d.example), [e](f.md#g)"
    assert NAMED.findall(text) == ["runtime/errors.py", "tests/golden/"]
    assert LINKED.findall(text) == ["b.md", "f.md"]


def test_comments_cite_documents_that_exist():
    cited = {}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            cited |= {name: path for name in re.findall(r"docs/\w+\.md", path.read_text(encoding="utf-8"))}
    assert "docs/model.md" in cited
    assert {name: path for name, path in cited.items() if not (ROOT / name).exists()} == {}


def test_the_picture_is_well_formed():
    assert ElementTree.parse(ROOT / "docs" / "architecture.svg").getroot().tag.endswith("svg")
