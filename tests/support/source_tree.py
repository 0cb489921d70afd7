"""The source as a graph: which module imports which, read from the files without running them."""

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The folders at the top of the repository, and the packages that they are once installed.
FOLDERS = {
    "uhd_export": "uhd_export",
    "runtime": "uhd_export.runtime",
    "plugins": "uhd_export.plugins",
    "calibration": "uhd_export.calibration",
}


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of the package by its installed name; a folder's `__init__.py` has the folder's name."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


@functools.cache
def tree(path: Path) -> ast.Module:
    """The syntax tree of one file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """What `path` imports, wherever in the file: modules of `known`, else the name as it is written.

    Imports inside functions and under TYPE_CHECKING count as well.
    """
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; use the full name"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in names}
    return found


@functools.cache
def import_graph() -> dict[str, set[str]]:
    """The modules of the package that each module imports."""
    known = modules()
    return {name: (imports(path, known) & known.keys()) - {name} for name, path in known.items()}
