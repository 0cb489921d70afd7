"""What is distributed: a source distribution that its tests can run from, and a wheel built of it.

The wheel is installed with its base dependencies and one backend, and used in a folder full of rivals: files
of the names that our folders have in the repository, none of which may ever be executed.
"""

import email
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ROOMS = ("calibration", "plugins", "runtime", "uhd_export")
BESIDE = ("benchmarks", "docs", "examples", "tests")
UNTRACKED = (".*", "__pycache__", "*.egg-info", "build", "dist", "demo")
HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "safetensors", "triton", "tensorrt_rtx", "gptqmodel")
RIVALS = ("runtime/__init__.py", "plugins/__init__.py", "calibration/__init__.py", "cli.py")
# Python itself looks into the current folder with -m and -c; a console script and its children must not.
SHADOWS = ("uhd_export/__init__.py", "click.py", "numpy.py")
QUESTION = "What is the code on the red card?"
BACKENDS = {"cpu", "cuda", "tensorrt-rtx", "tensorrt"}


def files_below(*folders: str) -> set[str]:
    """The files of `folders` in the repository, by their paths from its root."""
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*"))
    return {
        path.relative_to(ROOT).as_posix()
        for path in paths
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "copy", ignore=shutil.ignore_patterns(*UNTRACKED))
    code = "import setuptools.build_meta as build; build.build_sdist('../out')"
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=folder / "copy", check=True, capture_output=True)
    with tarfile.open(next((folder / "out").glob("uhd_export-*.tar.gz"))) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    return next((folder / "unpacked").iterdir())


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """The wheel, built from the source distribution."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", out, sdist], check=True, capture_output=True)
    return next(out.glob("uhd_export-*.whl"))


@pytest.fixture(scope="module")
def metadata(wheel) -> email.message.Message:
    """The wheel's METADATA."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def distributions(requirements: list[str], extra: str) -> Iterator[importlib.metadata.Distribution]:
    """The installed distributions that `requirements` lead to with `extra` of ours, and none of others."""
    waiting, seen = list(requirements), set()
    while waiting:
        needed = Requirement(waiting.pop())
        name = re.sub("[-_.]+", "-", needed.name).lower()
        if name not in seen and (needed.marker is None or needed.marker.evaluate({"extra": extra})):
            seen.add(name)
            found = importlib.metadata.distribution(needed.name)
            waiting += found.requires or []
            yield found


@pytest.fixture(scope="module")
def environment(wheel, metadata, tmp_path_factory) -> Path:
    """A virtual environment with the wheel, and links to what the extra cpu brings in this environment."""
    folder = tmp_path_factory.mktemp("fresh")
    links, env = folder / "dependencies", folder / "env"
    links.mkdir()
    for found in distributions(metadata.get_all("Requires-Dist"), "cpu"):
        for top in {path.parts[0] for path in found.files} - {"..", "__pycache__"}:
            if not (links / top).exists():
                (links / top).symlink_to(found.locate_file(top))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", env], check=True)
    (site_packages(env) / "dependencies.pth").write_text(f"{links}\n")
    before = set(os.listdir(site_packages(env)))
    install = ["install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run([sys.executable, "-m", "pip", "--python", env, *install], check=True, capture_output=True)
    gained = set(os.listdir(site_packages(env))) - before
    assert gained == {"uhd_export", f"uhd_export-{metadata['Version']}.dist-info"}
    return env


def site_packages(env: Path) -> Path:
    """The folder into which `env` installs."""
    return next(env.glob("lib/python3*/site-packages"))


@pytest.fixture(scope="module")
def nano_bundle(tmp_path_factory) -> Path:
    """A bundle of the embedded model, which reads `examples/` rightly."""
    from uhd_export.bundle.build import build_bundle

    folder = tmp_path_factory.mktemp("bundles") / "nano"
    build_bundle("nano", folder, verify=False)
    return folder


@pytest.fixture
def among_rivals(environment, tmp_path):
    """`among_rivals(*command)`: its stdout, in a folder of rivals with another on PYTHONPATH.

    Both folders hold modules with the names of our rooms; what executes one of them fails the test.
    """
    marker = tmp_path / "executed"
    code = f"open({str(marker)!r}, 'a').write(__file__ + chr(10))\nraise SystemExit('a rival ran')\n"

    def folder(name, *files) -> Path:
        for file in files:
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(code)
        return tmp_path / name

    variables = {**os.environ, "PYTHONPATH": str(folder("path", *RIVALS)), "COLUMNS": "100"}
    here = {"uhd-export": folder("script", *RIVALS, *SHADOWS), "python": folder("module", *RIVALS)}

    def run(*command) -> str:
        program = [environment / "bin" / command[0], *command[1:]]
        done = subprocess.run(program, cwd=here[command[0]], env=variables, capture_output=True, text=True)
        assert not marker.exists(), marker.read_text()
        assert done.returncode == 0, done.stderr
        return done.stdout

    yield run
    assert not marker.exists(), marker.read_text()


def test_the_sdist_holds_what_its_tests_need(sdist):
    expected = files_below(*ROOMS, *BESIDE)
    expected |= {"cli.py", "pyproject.toml", "Makefile"}
    expected |= {path.name for path in ROOT.glob("*.md")} | {"LICENSE", "MANIFEST.in"}
    made = {"PKG-INFO", "setup.cfg"}
    found = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    assert {name for name in found if ".egg-info/" not in name} == expected | made


def test_every_file_of_the_rooms_is_in_the_wheel(wheel):
    inside = {name for name in files_below(*ROOMS) if name.startswith("uhd_export/")}
    mapped = {f"uhd_export/{name}" for name in files_below(*ROOMS) - inside}
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == inside | mapped


def test_what_the_wheel_says_of_itself(wheel, metadata):
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    python = "Programming Language :: Python :: 3."
    versions = {name for name in metadata.get_all("Classifier") if name.startswith(python)}
    assert versions == {python + minor for minor in ("11", "12", "13")}
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(metadata.get_all("Provides-Extra")) == set(extras) >= BACKENDS
    with zipfile.ZipFile(wheel) as archive:
        licence = next(name for name in archive.namelist() if name.endswith("licenses/LICENSE"))
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()


def test_the_environment_holds_no_more_than_a_device_needs(among_rivals):
    names = [*HEAVY, "numpy", "onnxruntime", "uhd_export"]
    code = f"import importlib.util as u; print([n for n in {names} if u.find_spec(n)])"
    assert among_rivals("python", "-c", code) == "['numpy', 'onnxruntime', 'uhd_export']\n"


@pytest.mark.parametrize("program", [("uhd-export",), ("python", "-m", "uhd_export")], ids=" ".join)
def test_commands_among_rivals(among_rivals, program, nano_bundle):
    image = ROOT / "examples" / "cards-1.png"

    def uhd(*arguments):
        return among_rivals(*program, *arguments)

    assert "profile" in uhd("--help")
    assert "1014" in uhd("plan", "1008x672")
    assert uhd("run", nano_bundle, image, QUESTION) == "900\n"
    assert json.loads(uhd("inspect", nano_bundle, "--json"))["backend"] == "onnxruntime"
    checked = uhd("check", nano_bundle)
    assert "SHA-256 as recorded" in checked and "pip install 'uhd-export[export]'" in checked
    options = ("--size", "500x336", "--repeats", "1", "--tokens", "2", "--grid", "selective", "--json")
    measured = json.loads(uhd("profile", nano_bundle, *options))
    assert len(measured["modes"]) == 1 and measured["repeats"] == 1


def test_without_a_backend_one_line_says_what_to_install(environment, nano_bundle, tmp_path):
    hidden = tmp_path / "onnxruntime"
    hidden.mkdir()
    (hidden / "__init__.py").write_text("raise ModuleNotFoundError('no module', name='onnxruntime')\n")
    command = [environment / "bin" / "uhd-export", "run", nano_bundle, ROOT / "examples" / "cards-1.png", "?"]
    variables = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: backend onnxruntime: not installed .*'uhd-export\[cpu\]', or .*\n", done.stderr
    )


def test_the_public_names_among_rivals(among_rivals):
    code = (
        "from uhd_export.runtime import Pipeline\n"
        "import uhd_export, uhd_export.plugins, uhd_export.calibration\n"
        "print(Pipeline.__module__)\n"
    )
    assert among_rivals("python", "-c", code) == "uhd_export.runtime.pipeline\n"
