"""A small quantization: pairs to calibrate on, and options."""

import numpy as np
from PIL import Image

from uhd_export.calibration.options import CalibrationOptions, GptqOptions, QuantizeOptions
from uhd_export.checkpoint.options import SourceOptions
from uhd_export.runtime.language.pairs import Pair, Turn


def noise_pairs(count=6):
    rng = np.random.default_rng(0)
    noise = (Image.fromarray(rng.integers(0, 256, (150, 120 + 20 * i, 3), np.uint8)) for i in range(count))
    return [Pair((image,), (Turn("What is the code?", "1"),), f"pair {i}") for i, image in enumerate(noise)]


def quantize_options(source, **changes):
    whole = {
        "reading": SourceOptions(vision_tower=source / "clip"),
        "gptq": GptqOptions(group=64),
        "calibration": CalibrationOptions(samples=4, held_out=2, length=256),
    }
    return QuantizeOptions(**{**whole, **changes})
