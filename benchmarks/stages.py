"""How long each stage of a build and of GPTQ takes, at Vicuna-7B's width: what the whole bar weighs them by.

A cut of the language model with random weights is quantized on two card images, and built with
`--preset small` and its parity measured; the embedded model is quantized and asked, as only it is. Seconds by
stage are divided by what the stage goes through. GPTQ's own rate is of `quantize.py`, TensorRT's of
`engines.py`; `presets.py` puts all into what is shipped. About ten minutes on two cores.

    python benchmarks/stages.py [--layers 2] [--json FILE]
"""

import argparse
import json
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
SAMPLES, QUESTIONS = 2, 20


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


def taken() -> dict[str, float]:
    """Seconds by stage since it was asked last."""
    seconds = dict(SECONDS)
    SECONDS.clear()
    return seconds


def measure(folder: Path, layers: int) -> dict[str, float]:
    """Seconds of a stage for each of what it goes through (see `uhd_export.bundle.stages`)."""
    from uhd_export.bundle.build import build_bundle
    from uhd_export.bundle.cost import model_sizes
    from uhd_export.bundle.presets import PRESETS
    from uhd_export.bundle.stages import ASKING, GPTQ, build_units, gptq_units
    from uhd_export.calibration.options import CalibrationOptions, QuantizeOptions
    from uhd_export.calibration.quantize import quantize
    from uhd_export.checkpoint.config import read_config

    def options(questions: int) -> QuantizeOptions:
        calibration = CalibrationOptions(samples=SAMPLES, held_out=1, questions=questions)
        return QuantizeOptions(calibration=calibration)

    checkpoint = make_checkpoint(folder / "checkpoint", layers, group=None)
    sizes = model_sizes(read_config(checkpoint))
    quantize(checkpoint, folder / "gptq", options=options(0), progress=True)
    gptq = taken()
    build_bundle(folder / "gptq", folder / "small", options=PRESETS["small"].options(), progress=True)
    build = taken()
    quantize("nano", folder / "nano", options=options(QUESTIONS), progress=True)
    units = build_units(sizes, int8_vision=True, int8_cache=True, verify=True, backend="onnxruntime")
    units |= gptq_units(sizes, images=SAMPLES + 1, samples=SAMPLES)
    rates = {stage: seconds / units[stage] for stage, seconds in (gptq | build).items() if stage != GPTQ}
    return rates | {ASKING: taken()[ASKING] / QUESTIONS}


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=2, help="of the language model's cut")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rates = measure(Path(folder), options.layers)
    for stage, seconds in rates.items():
        print(f"{stage}: {seconds:.3g} s a unit")
    if options.json:
        result = {"layers": options.layers, "machine": machine(), "seconds": rates}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
