"""The embedded model with each preset of `build`: answers, loss, sizes; and how fast a build is.

Everything goes through the command line. GPTQ runs once. What comes out is shipped, for `build` to say before
it starts (`uhd_export/nano/presets.json`). Rates of a model of Vicuna-7B's size are those of `stages.py`,
`quantize.py` and `engines.py`. About ten minutes on two cores.

    python benchmarks/presets.py [--count 200] [--work FOLDER] [--preset small ...]
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from uhd_export.bundle.presets import PRESETS
from uhd_export.bundle.stages import GPTQ
from uhd_export.runtime.files import write_file

ROOT = Path(__file__).parents[1]
RESULTS, OUT = ROOT / "benchmarks" / "results", ROOT / "uhd_export" / "nano" / "presets.json"
# Vicuna-7B's linear weights a layer, which `quantize.py` quantizes one of, and its head's.
_LAYER, _HEAD = 4 * 4096**2 + 3 * 4096 * 11008, 4096 * 32000


def rates() -> dict:
    """Seconds of each stage of building and of GPTQ, a unit, from the committed results."""
    stages, layer, engines = (
        json.loads((RESULTS / f"{name}-cpu.json").read_text()) for name in ("stages", "quantize", "engines")
    )
    seconds = stages["seconds"] | {GPTQ: (0, layer["seconds"] / (_LAYER * layer["tokens"]))}
    vision, language = engines["vision"], engines["language"]
    seconds["vision.engine"] = 2 * vision["build_seconds"] / vision["weight_bytes"], 0
    seconds["language.engine"] = 0, language["build_seconds"] / (language["layers"] * _LAYER + _HEAD)
    return {"machine": f"{layer['machine']['cores']}-core CPU", "seconds": seconds}


def command(*arguments: object) -> str:
    """What `uhd-export` with `arguments` prints."""
    run = [sys.executable, "-P", "-m", "uhd_export", *map(str, arguments)]
    done = subprocess.run(run, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"uhd-export {arguments[0]}: {done.stderr.strip()}")
    return done.stdout


def measure(folder: Path, preset: str, count: int) -> dict:
    """One preset: built, asked `count` questions."""
    bundle = folder / preset
    gptq = folder / "nano-gptq"
    if PRESETS[preset].weights == "int4" and gptq.exists():  # made of the same, and taken again
        shutil.copytree(gptq, bundle.with_name(f"{preset}-gptq"), dirs_exist_ok=True)
    build = ["build", "nano", "-o", bundle, "--preset", preset, "--force", "--no-verify"]
    command(*build, *(["--eval", 0] if PRESETS[preset].weights == "int4" else []))
    if PRESETS[preset].weights == "int4" and not gptq.exists():
        shutil.copytree(bundle.with_name(f"{preset}-gptq"), gptq)
    asked = json.loads(command("eval", bundle, "--count", count, "--json"))
    sizes = {path.name: path.stat().st_size for path in sorted(bundle.iterdir())}
    return {"questions": asked["total"], "exact": asked["exact"], "bytes": sizes}


def record(preset: str | None, row: dict) -> None:
    """Write `row` for `preset` and the rates into what is shipped; other presets stay as they were."""
    rows = json.loads(OUT.read_text())["presets"] if OUT.exists() else {}
    rows |= {} if preset is None else {preset: row}
    ordered = {name: rows[name] for name in PRESETS if name in rows}
    write_file(OUT, json.dumps({"rates": rates(), "presets": ordered}, indent=1) + "\n")


def show(result: dict) -> None:
    """Rows of the table in docs/quantization.md."""
    for name, row in result["presets"].items():
        print(f"| {name} | {sum(row['bytes'].values()) / 1e6:.2f} | {row['exact']} of {row['questions']} |")


def main() -> None:
    """Measure, print, and write what is shipped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--work", type=Path, help="where bundles and the GPTQ checkpoint stay")
    parser.add_argument("--preset", nargs="*", default=list(PRESETS), choices=list(PRESETS))
    options = parser.parse_args()
    record(None, {})
    with tempfile.TemporaryDirectory() as temporary:
        for preset in options.preset:
            record(preset, measure(options.work or Path(temporary), preset, options.count))
    show(json.loads(OUT.read_text()))


if __name__ == "__main__":
    main()
