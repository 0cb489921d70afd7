"""Something is on the screen before PyTorch is loaded, which takes seconds."""

import os
import pty
import select
import subprocess
import sys

import pytest

SLOW = "import time; time.sleep(600)"  # what takes a while, made to take for ever


@pytest.mark.parametrize("command", ["build", "quantize", "check", "study"])
def test_something_is_shown_before_torch_is_loaded(command, golden_bundle, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(SLOW)
    arguments = {
        "build": ("build", "nano", "-o", tmp_path / "out"),
        "quantize": ("quantize", "nano", "-o", tmp_path / "out"),
        "check": ("check", golden_bundle),
        "study": ("profile", "--study", "table4", "--count"),
    }[command]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "uhd_export", *(str(argument) for argument in arguments)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "TERM": "xterm"},
    )
    os.close(theirs)
    try:
        shown = b""
        while b"loading PyTorch" not in shown:
            assert select.select([ours], [], [], 60)[0], f"nothing but {shown!r} for a minute"
            shown += os.read(ours, 4096)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
