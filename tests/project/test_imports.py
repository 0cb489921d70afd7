"""The runtime must load on a device that has neither PyTorch nor transformers."""

import json
import os
import pkgutil
import subprocess
import sys

import pytest
from support.source_tree import ROOT

from uhd_export import runtime

HEAVY = ("torch", "transformers", "safetensors", "onnx", "triton")
PROBE = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def loaded_by(*modules: str) -> set[str]:
    """Top-level packages in a fresh interpreter that imported `modules`."""
    done = subprocess.run([sys.executable, "-c", PROBE, *modules], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_the_whole_runtime_imports_without_torch():
    modules = [m.name for m in pkgutil.walk_packages(runtime.__path__, "uhd_export.runtime.")]
    assert {
        "uhd_export.runtime.image.slicing",
        "uhd_export.runtime.image.geometry",
        "uhd_export.runtime.language.prompt",
    } <= set(modules)
    loaded = loaded_by("uhd_export.runtime", *modules)
    assert "uhd_export" in loaded
    assert not loaded & set(HEAVY)


@pytest.mark.parametrize("module", ["uhd_export", "uhd_export.cli.main"])
def test_the_command_line_starts_light(module):
    assert not loaded_by(module) & {*HEAVY, "numpy", "onnxruntime", "PIL"}


def test_the_probe_sees_heavy_imports():
    assert "safetensors" in loaded_by("safetensors")


def test_the_front_door_of_a_clone(tmp_path):
    """`python cli.py` is the command, from any folder; a folder of a room's name there is not executed."""
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime" / "__init__.py").write_text("raise SystemExit('a rival ran')")
    command = [sys.executable, ROOT / "cli.py", "plan", "1008x672", "--json"]
    variables = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["slice_grid"] == [3, 2]
