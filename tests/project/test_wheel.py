"""The built wheel must hold every package and all of its data: a fresh install has nothing else."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("runtime", "uhd_export", "plugins", "calibration")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "cli.py"):
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(out), str(source)], check=True, capture_output=True)
    return zipfile.ZipFile(next(out.glob("uhd_export-*.whl")))


def test_every_file_of_the_packages_is_in_the_wheel(wheel):
    expected = set()
    for room in PACKAGES:
        inside = ROOT if room == "uhd_export" else ROOT / "uhd_export"
        files = (
            path for path in (ROOT / room).rglob("*") if path.is_file() and "__pycache__" not in path.parts
        )
        names = (path.relative_to(ROOT) for path in files if "__pycache__" not in path.parts)
        expected |= {(inside / name).relative_to(ROOT).as_posix() for name in names}
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected


def test_the_wheel_installs_the_command(wheel):
    info = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "uhd-export = uhd_export.cli.main:main" in wheel.read(info).decode()


def test_the_runtime_needs_no_export_extra(wheel):
    metadata = wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))).decode()
    needed = [
        line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra" not in line
    ]
    assert not any(name in line for line in needed for name in ("torch", "transformers", "onnx-ir"))
    for extra in ("export", "gptq", "tensorrt", "dev"):
        assert f"Provides-Extra: {extra}" in metadata
