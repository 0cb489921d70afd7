"""How long each stage of a build and of GPTQ takes, at Vicuna-7B's width: what the whole bar weighs them by.

Two cuts of the language model with random weights are built with `--preset small` and their parity measured;
one of a layer is quantized on four card images; the embedded model is quantized and asked, as only it is.
Seconds by stage are divided by what a stage goes through. GPTQ's own rate is of `quantize.py`, TensorRT's of
`engines.py`; `presets.py` puts all into what is shipped. About twenty minutes on two cores.

    python benchmarks/stages.py [--json FILE]
"""

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from full_size import make_checkpoint

from uhd_export.runtime import progress
from uhd_export.runtime.profiling.machine import machine

SECONDS: Counter[str] = Counter()
# Of the cuts that are built; from two a stage that goes through both parts tells what each takes.
LAYERS = 2, 8
SAMPLES, QUESTIONS = 4, 20


class _Silent:
    """A bar that draws nothing."""

    def __getattr__(self, name: str) -> object:
        return lambda *_: None


@contextmanager
def timed(label: str, *_: object, **__: object) -> Iterator[_Silent]:
    """Instead of a bar: the seconds of the block, by its label."""
    start = time.perf_counter()
    yield _Silent()
    SECONDS[label] += time.perf_counter() - start


progress.progress_bar = timed  # before those are imported who take it from there

from uhd_export.bundle.build import build_bundle  # noqa: E402
from uhd_export.bundle.cost import model_sizes  # noqa: E402
from uhd_export.bundle.presets import PRESETS  # noqa: E402
from uhd_export.bundle.stages import (  # noqa: E402
    ASKING,
    IMAGES,
    WRITING,
    Units,
    build_units,
    gptq_units,
)
from uhd_export.calibration.options import CalibrationOptions, QuantizeOptions  # noqa: E402
from uhd_export.calibration.quantize import quantize  # noqa: E402
from uhd_export.checkpoint.config import read_config  # noqa: E402


def taken() -> dict[str, float]:
    """Seconds by stage since it was asked last."""
    seconds = dict(SECONDS)
    SECONDS.clear()
    return seconds


def build(folder: Path, layers: int) -> dict[str, tuple[float, Units]]:
    """Seconds by stage of building a cut of so many layers, and what each goes through."""
    checkpoint = make_checkpoint(folder / f"checkpoint-{layers}", layers)
    taken()
    build_bundle(checkpoint, folder / f"small-{layers}", options=PRESETS["small"].options(), progress=True)
    sizes = model_sizes(read_config(checkpoint))
    units = build_units(sizes, int8_vision=True, int8_cache=True, verify=True, backend="onnxruntime")
    return {stage: (seconds, units[stage]) for stage, seconds in taken().items()}


def rates(few: tuple[float, Units], many: tuple[float, Units]) -> tuple[float, float]:
    """Seconds a number of the vision part, and one of the language model, of the same stage in two cuts."""
    (seconds, (vision, language)), (more_seconds, (_, more_language)) = few, many
    if not vision:
        return 0.0, more_seconds / more_language
    if not language:
        return more_seconds / vision, 0.0
    slope = max(more_seconds - seconds, 0.0) / (more_language - language)
    return max(seconds - slope * language, 0.0) / vision, slope


def quantize_cut(folder: Path) -> dict[str, tuple[float, float]]:
    """The same of GPTQ's stages but its own: a cut of one layer, and the embedded model, which is asked."""

    def run(source: str | Path, questions: int) -> dict[str, float]:
        calibration = CalibrationOptions(samples=SAMPLES, held_out=1, questions=questions)
        taken()
        quantize(
            source,
            folder / f"gptq-{questions}",
            options=QuantizeOptions(calibration=calibration),
            progress=True,
        )
        return taken()

    checkpoint = make_checkpoint(folder / "dense", 1, group=None)
    units = gptq_units(model_sizes(read_config(checkpoint)), images=SAMPLES + 1, samples=SAMPLES)
    found = run(checkpoint, 0)
    writing = found[WRITING] / sum(units[WRITING])
    return {
        IMAGES: (found[IMAGES] / units[IMAGES][0], 0.0),
        WRITING: (writing, writing),
        ASKING: (0.0, run("nano", QUESTIONS)[ASKING] / QUESTIONS),
    }


def measure(folder: Path) -> dict[str, tuple[float, float]]:
    """See `uhd_export.bundle.stages`."""
    few, many = (build(folder, layers) for layers in LAYERS)
    return {stage: rates(few[stage], many[stage]) for stage in few} | quantize_cut(folder)


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    for stage, (vision, language) in found.items():
        print(f"{stage}: {vision:.3g} s a number of the vision part, {language:.3g} of the language model")
    if options.json:
        result = {"layers": LAYERS, "machine": machine("cpu", os.cpu_count()), "seconds": found}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
