"""A whole model of Vicuna-7B's size on this machine's CPU: build, one answer, profile, parity.

Random weights in the official format and names (13.8 GB), int4 rounded to the nearest, everything through the
command line as a user would call it, each command in a process of its own. Takes 20 GB of disk and, on two
cores, about a quarter of an hour, most of it for the profile and the parity.

    python benchmarks/full_size.py [--layers 32] [--json FILE]
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMAGE, QUESTION = ROOT / "examples" / "cards-1.png", "What is the code on the red card?"


def make_checkpoint(folder: Path, layers: int) -> Path:
    """The checkpoint, with the embedded model's tokenizer: its ids are a part of the vocabulary's."""
    from random_checkpoint import write_checkpoint

    from uhd_export.checkpoint.source import EMBEDDED

    write_checkpoint(folder, language_layers=layers)
    shutil.copy(EMBEDDED / "tokenizer.json", folder)
    return folder


def command(*arguments: object) -> dict:
    """Run `uhd-export` with `arguments`: seconds, and what it printed."""
    start = time.perf_counter()
    run = [sys.executable, "-P", "-m", "uhd_export", *arguments]
    done = subprocess.run([str(part) for part in run], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"uhd-export {arguments[0]}: {done.stderr.strip()}")
    return {"seconds": time.perf_counter() - start, "printed": done.stdout}


def measure(folder: Path, layers: int) -> dict:
    """All four, the checkpoint's writing aside."""
    checkpoint, bundle = make_checkpoint(folder / "checkpoint", layers), folder / "bundle"
    build = command("build", checkpoint, "-o", bundle, "--weights", "int4-rtn", "--no-verify")
    sizes = {path.name: path.stat().st_size for path in sorted(bundle.iterdir())}
    run = command("run", bundle, IMAGE, QUESTION, "--max-new-tokens", 8)
    profile = command("profile", bundle, "--repeats", 2, "--tokens", 8, "--json")
    check = command("check", bundle)
    return {
        "layers": layers,
        "build_seconds": build["seconds"],
        "bundle_bytes": sizes,
        "run_seconds": run["seconds"],
        "profile": json.loads(profile["printed"]),
        "check_seconds": check["seconds"],
        "check": check["printed"].splitlines(),
    }


def show(result: dict) -> None:
    """What a reader wants to know first."""
    size = sum(result["bundle_bytes"].values())
    print(f"{result['layers']} layers: built in {result['build_seconds']:.0f} s, {size / 1e9:.2f} GB")
    print(f"run, from the command to 8 tokens of the answer: {result['run_seconds']:.0f} s")
    for mode in result["profile"]["modes"]:
        stages = ", ".join(f"{n} {s['seconds']['median']:.2f}" for n, s in mode["stages"].items())
        peak = "not taken" if mode["peak_bytes"] is None else f"{mode['peak_bytes'] / 1e9:.2f} GB"
        print(
            f"{mode['grid_mode']}: first token {mode['first_token']['median']:.1f} s ({stages}), "
            f"{mode['tokens_per_second']:.1f} tokens/s, peak {peak}"
        )
    print("\n".join(result["check"]))


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32, help="of the language model; 32 is Vicuna-7B")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), options.layers)
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
