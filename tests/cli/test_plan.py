import contextlib
import errno
import io
import json
import os
import signal
import subprocess
import sys

import pytest
from click.testing import CliRunner
from golden import recipe
from PIL import Image

from uhd_export.cli import main as cli
from uhd_export.cli.main import STOPPED, OneLineErrors, main
from uhd_export.runtime.errors import UhdError, explain
from uhd_export.runtime.image.slicing import plan_slices
from uhd_export.runtime.terminal.report import describe_plan


def run(*arguments, group=main):
    return CliRunner().invoke(group, list(arguments))


def failing(error):
    """A group with one command that raises `error`."""
    group = OneLineErrors("uhd-export")

    @group.command()
    def fail() -> None:
        raise error

    return group


def one_line(result, code):
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr[len("error: ") : -1]


def test_plan_of_the_papers_size_as_json():
    facts = json.loads(run("plan", "1008x672", "--json").stdout)
    assert facts["source_size"] == [1008, 672]
    assert facts["slice_grid"] == [3, 2]
    assert facts["slice_size"] == [336, 336]
    assert facts["overview_size"] == [406, 266]
    assert facts["indicator_tokens"] == [29892, 29892, 13, 29892, 29892, 13]
    assert facts["visual_tokens"] == {"flat": 1014, "merged": 1033}
    assert [crop["size"] for crop in facts["crops"]] == [[336, 336]] * 6 + [[406, 266]]
    assert facts["crops"][0] == {"size": [336, 336], "patches": [24, 24], "keys_per_window": 27}
    assert facts["crops"][6]["patches"] == [29, 19]
    assert facts["costs"]["kv_bytes_float16"] == 1066 * 2**19


def test_plan_of_a_small_image_has_no_slices():
    facts = json.loads(run("plan", "300x200", "--json").stdout)
    assert facts["slice_grid"] is facts["slice_size"] is facts["refined_size"] is None
    assert facts["indicator_tokens"] == [] and len(facts["crops"]) == 1
    assert facts["visual_tokens"] == {"flat": 144, "merged": 144}


def test_options_reach_the_plan():
    facts = json.loads(
        run("plan", "500x120", "--resize", "1024", "--max-slices", "7", "--grid", "fix", "--json").stdout
    )
    assert facts == json.loads(
        json.dumps(describe_plan(plan_slices((500, 120), resize=1024, max_slices=7), grid_mode="fix"))
    )
    assert facts["resized_size"] == [1024, 245]
    assert {crop["keys_per_window"] for crop in facts["crops"]} == {27}


@pytest.mark.parametrize("size", ["1x5000", "5000x1", "2x5000"])
def test_plan_says_where_a_model_refuses_the_crops(size):
    assert "less elongated" in json.loads(run("plan", size, "--json").stdout)["refused"]
    (line,) = [line for line in run("plan", size).stdout.splitlines() if "refused" in line]
    assert line.startswith("refused: crop of ") and line.endswith("at most 144 times as long as it is wide")
    assert json.loads(run("plan", "1008x672", "--json").stdout)["refused"] is None


def test_plan_as_a_table():
    result = run("plan", "1008x672")
    assert result.exit_code == 0 and result.stderr == ""
    for text in ("1008 x 672", "3 x 2 slices", "336 x 336 (24 x 24 patches", "406 x 266 (29 x 19 patches"):
        assert text in result.stdout
    assert "1014 flat, 1033 merged" in result.stdout
    assert "8,461.4" in result.stdout  # the released projector's GFLOP
    assert "558.89 MB float16" in result.stdout


def test_plan_of_an_image_file_sees_its_rotation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(recipe.image(672, 1008)).save(tmp_path / "turned.jpg", exif=exif)
    facts = json.loads(run("plan", str(tmp_path / "turned.jpg"), "--json").stdout)
    assert facts["source_size"] == [1008, 672]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["plan", "nowhere.png"], "source 'nowhere.png': neither a size like 1008x672 nor an image file"),
        (["plan", "0x5"], "image size 0x5"),
        (
            ["plan", "5x5", "--max-slices", "0"],
            "Invalid value for '--max-slices': 0 is not in the range x>=1",
        ),
        (
            ["plan", "5x5", "--grid", "auto"],
            "'--grid': 'auto' is not one of 'selective', 'fix', 'pyramid'",
        ),
        (["plan", "5000x1", "--resize", "1024"], "use a larger --resize or none"),
        (
            ["plan", "5x5", "--resize", "big"],
            "not a valid integer range; see `uhd-export plan --help`",
        ),
        (["plan"], "Missing argument"),
        (["paln"], "No such command 'paln'"),
        (["--fast"], "No such option '--fast'; see `uhd-export --help`"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(arguments, words):
    result = run(*arguments)
    assert words in one_line(result, 2)


@pytest.mark.parametrize(
    "error, code, words",
    [
        (UhdError("field x: is\n  broken"), 2, "field x: is broken"),
        (MemoryError(), 2, "not enough memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
            2,
            "not enough memory",
        ),
        (OSError(errno.ENOSPC, "No space", "/x/y"), 2, "/x/y: disk full; free some space"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 2, "disk full"),
        (PermissionError(errno.EACCES, "no", "/x"), 2, "/x: permission denied"),
        (
            ModuleNotFoundError("No module named 'onnx_ir'", name="onnx_ir"),
            2,
            "this needs onnx_ir, which is not installed: pip install 'uhd-export[export]'",
        ),
        (ModuleNotFoundError("", name="triton.language"), 2, "this needs triton, which is not installed"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_failures_are_one_line_with_the_remedy(error, code, words):
    result = run("fail", group=failing(error))
    assert one_line(result, code).startswith(words)


@pytest.mark.parametrize("arguments", [("--debug", "fail"), ("fail", "--debug")])
def test_debug_shows_the_traceback(arguments):
    result = run(*arguments, group=failing(UhdError("broken")))
    assert "Traceback" in result.stderr and result.stderr.endswith("error: broken\n")


def test_defects_of_the_program_keep_their_traceback():
    result = run("fail", group=failing(ZeroDivisionError("oops")))
    assert result.exit_code == 1
    assert "Traceback" in result.stderr and "please report it (ZeroDivisionError: oops)" in result.stderr
    assert explain(ZeroDivisionError()) is None
    assert explain(ModuleNotFoundError("No module named 'uhd_export.gone'", name="uhd_export.gone")) is None


def test_help_without_a_command():
    assert run().exit_code == 0 and "plan" in run().stdout
    assert "Usage: uhd-export plan" in run("plan", "-h").stdout


def test_version():
    assert run("--version").stdout.startswith("uhd-export, version ")


def test_interrupt_of_the_real_process_ends_with_130(tmp_path):
    """A command that waits, interrupted as the terminal would do it, in code that replaces the exception."""
    script = tmp_path / "wait.py"
    script.write_text(
        "import time\nfrom uhd_export.cli.main import main\n\n@main.command()\ndef wait():\n"
        "    try:\n        print('ready', flush=True)\n        time.sleep(60)\n"
        "    except KeyboardInterrupt:\n        raise ValueError('lost') from None\n\nmain(['wait'])\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr == f"error: {STOPPED}\n"


def test_ctrl_c_ends_a_terminals_line(monkeypatch):
    monkeypatch.setattr(
        "uhd_export.cli.main.sys.stderr", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})()
    )
    monkeypatch.setattr("uhd_export.cli.main.sys.exit", lambda code: None)
    failing(KeyboardInterrupt()).main(["fail"])
    assert cli.sys.stderr.getvalue() == f"\nerror: {STOPPED}\n"


def test_ctrl_c_while_the_program_starts_is_no_traceback(tmp_path):
    """A click that waits stands for imports that take long."""
    (tmp_path / "click.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-P", "-m", "uhd_export", "--help"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == -signal.SIGINT


def test_an_error_of_our_own_after_an_interrupt_has_its_own_reason():
    group = OneLineErrors("uhd-export")

    @group.command()
    def swallowed():
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise UhdError("too large")

    @group.command()
    def replaced():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise UhdError("cannot load it") from None

    assert one_line(run("swallowed", group=group), 2) == "too large"
    assert one_line(run("replaced", group=group), 130) == STOPPED


def test_plan_loads_no_torch():
    code = (
        "import sys\nfrom uhd_export.cli.main import main\n"
        "try:\n    main(['plan', '1008x672'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'onnxruntime', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
