"""docs/checkpoints.md: every row names a test that there is."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_row_names_a_test():
    text = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|") and not set(line) <= set("|- ")]
    rows = [line for line in rows if not line.endswith("| test |")]
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", text)
    assert len(rows) > 25 and all(re.search(r"\.py::\w+` \|$", line) for line in rows)
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file}::{test}"
