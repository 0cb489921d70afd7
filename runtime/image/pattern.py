"""A test image that is the same on every machine, for profiles and parity checks."""

import numpy as np
from PIL import Image


def pattern(width: int, height: int) -> Image.Image:
    """An RGB image of waves and edges."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [(3 * x + 2 * y) % 256, (5 * y + x * x // 128) % 256, (x // 23 + y // 17) % 3 * 127]
    return Image.fromarray(np.stack(waves, -1).astype(np.uint8))
