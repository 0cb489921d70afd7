"""The house's order: imports run one way between and inside rooms, no circles, small files.

That the runtime works without PyTorch is in test_imports.py.
"""

import ast
import graphlib
import re
import tomllib

import pytest
from support.source_tree import FOLDERS, ROOT, import_graph, imports, modules, tree

# From the ground up. A module may import from its own place and those below it.
ROOMS = ("runtime", "plugins", "uhd_export", "calibration", "cli")
# Inside a room likewise; modules of a row don't import each other's folders. What is not named is the
# ground, which imports nothing that is named.
INSIDE = {
    "runtime": (
        ("engines",),
        ("image", "config"),
        ("settings", "turns"),
        ("language",),
        ("bundle",),
        ("planning",),
        ("pipeline", "conversation"),
        ("profiling",),
        ("terminal",),
        ("report",),
        ("serving",),
        ("runtime",),
    ),
    "plugins": (("jbu", "window_attention"), ("operators", "roofline"), ("compile",), ("tensorrt",)),
    "uhd_export": (
        ("checkpoint",),
        ("model",),
        ("graph",),
        ("tensorrt",),
        ("nano",),
        ("bundle",),
        ("study",),
        ("uhd_export",),
    ),
}
# Inside serving, the largest of them, likewise.
SERVING = (
    ("sampling", "images", "cache"),
    ("scheduling",),
    ("service",),
    ("batch",),
    ("evaluation", "http"),
    ("cluster",),
)
# One place in two: a pipeline and its conversations; the sizes of a model and the geometry they give.
TOGETHER = ({"pipeline", "conversation"}, {"image", "config"})
MOST_LINES, MOST_PARAMETERS = 350, 9
WIDE = {
    "uhd_export.model.uhd.load_model",  # notebooks call it: keywords, one for each field they may replace
    "uhd_export.plugins.jbu.torch_op.reference",  # a registered operator: one for each of its tensors
}


def room(module: str) -> str:
    """The room that `module` belongs to."""
    parts = module.split(".")
    if module == "uhd_export.__main__":
        return "cli"
    return parts[1] if parts[1:2] and parts[1] in ROOMS else parts[0]


def place(module: str) -> tuple[int, str]:
    """Where `module` stands in its room: the height of its row (0 is the ground) and its name there.

    A room's own `__init__.py`, its public face, has the room's name.
    """
    parts = module.split(".")
    inner = parts[2:] if len(parts) > 1 and room(module) == parts[1] else parts[1:]
    name = inner[0] if inner else room(module)
    rows = INSIDE.get(room(module), ())
    return next((height for height, row in enumerate(rows, 1) if name in row), 0), name


def wrong_ways(graph: dict[str, set[str]]) -> list[str]:
    """The imports of `graph` that climb, between rooms or inside one."""
    found = []
    for module, targets in graph.items():
        for target in sorted(targets):
            here, there = ROOMS.index(room(module)), ROOMS.index(room(target))
            (height, name), (other_height, other_name) = place(module), place(target)
            inside = here == there and (
                other_height > height or (other_height == height > 0 and other_name != name)
            )
            if there > here or (inside and {name, other_name} not in TOGETHER):
                found.append(f"{module} -> {target}")
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring, or nothing."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_imports_run_one_way():
    assert wrong_ways(import_graph()) == []


def serving_ways(graph: dict[str, set[str]]) -> list[str]:
    """The imports of `graph` inside serving that climb, or go to another place of the same height."""
    inside = "uhd_export.runtime.serving."
    height = {name: number for number, row in enumerate(SERVING, 1) for name in row}
    found = []
    for module, targets in graph.items():
        here = module.removeprefix(inside).partition(".")[0]
        for target in sorted(targets if module.startswith(inside) else ()):
            there = target.removeprefix(inside).partition(".")[0]
            climbs = height.get(here, 0) <= height.get(there, 0) > 0 and here != there
            if target.startswith(inside) and climbs:
                found.append(f"{module} -> {target}")
    return found


def test_imports_run_one_way_inside_serving():
    assert serving_ways(import_graph()) == []
    places = {name.split(".")[3] for name in modules() if name.startswith("uhd_export.runtime.serving.")}
    assert {name for row in SERVING for name in row} <= places
    wrong = {"uhd_export.runtime.serving.cache.rows": {"uhd_export.runtime.serving.service"}}
    assert len(serving_ways(wrong)) == 1


def test_no_circle_of_files():
    graph = dict(import_graph())
    assert circle(graph) == []


@pytest.mark.parametrize(
    ("module", "target", "wrong"),
    [
        ("runtime.pipeline", "plugins.operators", True),
        ("plugins.graph", "model.uhd", True),
        ("checkpoint.source", "calibration.data", True),
        ("calibration.data", "cli.main", True),
        ("__main__", "cli.main", False),
        ("cli.main", "calibration.data", False),
        ("runtime.errors", "runtime.image.pixels", True),
        ("runtime.image.pixels", "runtime.errors", False),
        ("runtime.image.layout", "runtime.language.prompt", True),
        ("runtime.terminal.chat", "runtime.serving.server", True),
        ("runtime.terminal.chat", "runtime", True),
        ("plugins.jbu.kernel", "plugins.window_attention.kernel", True),
        ("plugins.jbu.kernel", "plugins.jbu.reference", False),
        ("checkpoint.source", "model.uhd", True),
        ("bundle.build", "tensorrt.builder", False),
        ("nano.cards", "bundle.build", True),
    ],
)
def test_a_wrong_way_is_seen(module, target, wrong):
    graph = {f"uhd_export.{module}": {f"uhd_export.{target}"}}
    assert bool(wrong_ways(graph)) == wrong


def test_a_circle_is_seen():
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}


def test_the_graph_is_the_whole_package():
    """Enough modules and edges to say something, and what is imported of the package exists."""
    graph = import_graph()
    assert {room(name) for name in graph} == set(ROOMS)
    assert "uhd_export.model.uhd" in graph["uhd_export"], "imports under TYPE_CHECKING and in functions count"
    for name, path in modules().items():
        ours = {target for target in imports(path, modules()) if target.partition(".")[0] == "uhd_export"}
        assert ours <= modules().keys(), name


def test_code_uses_installed_names():
    """`runtime` and the others are no top-level names, except as folders of the repository."""
    top = re.compile(r"(?:\bfrom|(?<!\w )\bimport) (?:runtime|plugins|calibration)\b")
    folders = (*FOLDERS, "benchmarks", "tests", "docs")
    paths = [path for folder in folders for kind in ("*.py", "*.md") for path in (ROOT / folder).rglob(kind)]
    texts = {path: path.read_text(encoding="utf-8") for path in [*paths, *ROOT.glob("*.md"), ROOT / "cli.py"]}
    assert [f"{path}: {top.search(text)[0]}" for path, text in texts.items() if top.search(text)] == []


def test_every_folder_of_modules_is_installed():
    folders = {path.parent for path in modules().values()}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []
    packages = {name for name, path in modules().items() if path.name == "__init__.py"}
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["packages"] == sorted(packages)
    assert settings["package-dir"] == {package: folder for folder, package in FOLDERS.items()}


def test_files_are_small():
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules().items()}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def test_functions_take_few_parameters():
    """Options travel as one object for each concern. A kernel's parameters are its launch's arguments."""
    long = {}
    for name, path in modules().items():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef) and not any(
                ast.unparse(decorator).startswith("triton.") for decorator in node.decorator_list
            ):
                given = node.args
                names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
                count = len(set(names) - {"self", "cls"})
                if count > MOST_PARAMETERS:
                    long[f"{name}.{node.name}"] = count
    assert long.keys() == WIDE, long
