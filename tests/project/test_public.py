"""What is promised to others: the names of `uhd_export`, its entry points, and functions one can call."""

import ast
import subprocess
import sys
from importlib.metadata import version

import pytest
from support.source_tree import ROOT, modules, tree

import uhd_export

MOST_PARAMETERS = 9
# Kernels and what has their signature name every tensor and stride; `load_model` is flat for notebooks.
FREE = {"load_model"}
KERNELS = {"uhd_export.plugins.window_attention.kernel", "uhd_export.plugins.jbu.kernel"}
SIGNATURES = {"uhd_export.plugins.jbu.torch_op"}


def test_the_public_surface():
    assert uhd_export.__all__ == ["__version__", "build_bundle", "check_bundle", "load_model"]
    from uhd_export.bundle.build import build_bundle
    from uhd_export.bundle.check import check_bundle
    from uhd_export.model.uhd import load_model

    assert (uhd_export.build_bundle, uhd_export.check_bundle) == (build_bundle, check_bundle)
    assert uhd_export.load_model is load_model
    assert uhd_export.__version__ == version("uhd-export")
    assert set(uhd_export.__all__) <= set(dir(uhd_export))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = uhd_export.nothing


def test_the_keywords_of_load_model():
    """Notebooks use them."""
    names = uhd_export.load_model.__kwdefaults__
    sources, images = (
        ["dtype", "revision", "config", "vision_tower", "layout", "mask"],
        ["grid_mode", "max_slices"],
    )
    assert list(names) == [*sources, *images, "resize", "roi_rounding"]


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = function.args
    return len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs)


def test_functions_take_few_parameters():
    long = {
        f"{module}.{node.name}"
        for module, path in modules().items()
        if module not in KERNELS | SIGNATURES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and parameters(node) > MOST_PARAMETERS
        and node.name not in FREE
    }
    assert not long


@pytest.mark.parametrize("door", [["-m", "uhd_export"], ["cli.py"]])
def test_the_front_doors_are_one_command(door):
    command = [sys.executable, *door, "plan", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: uhd-export plan [OPTIONS] WIDTHxHEIGHT|IMAGE\n")
