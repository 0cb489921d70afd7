"""What the ops must move and multiply at least, and the time below which no kernel can go.

Bytes count every input once and every output once per call; FLOPs are those of the op's definition, 2
a multiply-add: what an implementation adds (halos, composed stencils, padded tiles) is not in them. The
floor is the longer of bytes over memory bandwidth and FLOPs over the tensor cores' dense float16 peak.

`python -m uhd_export.plugins.roofline` prints the floors of one 1008x672 image: six 24x24 crops in one
call, the 19x29 overview in another.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from uhd_export.plugins.window_attention.launch import LevelShape
from uhd_export.runtime.image.geometry import bin_grid, roi_align
from uhd_export.runtime.profiling.costs import Cost

TAPS, RANGE, COLOURS, FIXUP_IN = 49, 32, 3, 52
CROPS = ((6, 24, 24), (1, 19, 29))  # batch, rows, columns of patches at 1008x672
SCALES = (1, 2, 4)
SIDE, CHANNELS, QUERIES = 12, 1024, 128  # ViT-L and Vicuna-7B (32 heads of four query sets)


@dataclass(frozen=True)
class Device:
    """Data-sheet figures: bytes and float16 FLOPs a second."""

    name: str
    bandwidth: float
    flops: float


DEVICES = (
    Device("H200", 4.8e12, 989e12),
    Device("RTX 4090", 1.0e12, 165e12),
    Device("Jetson AGX Orin", 0.2e12, 42e12),
)
KNOWN_DEVICES = (*DEVICES, Device("H100", 3.35e12, 989e12), Device("A100", 2.0e12, 312e12))


def floor(cost: Cost, device: Device, size: int = 2) -> float:
    """Least seconds that `cost` takes on `device`, elements being of `size` bytes."""
    return max(cost.elements * size / device.bandwidth, cost.flops / device.flops)


def jbu_cost(batch: int, height: int, width: int, channels: int) -> Cost:
    """One JBU stage of a (batch, height, width, channels) source; weights and matrices are negligible."""
    pixels = 4 * batch * height * width
    features = COLOURS * RANGE + RANGE * RANGE
    fixup = FIXUP_IN * TAPS + TAPS * TAPS
    # Bicubic doubling takes 4 taps for a row, then 4 for a column of twice as many rows.
    doubling = (4 + 2) * channels
    per_pixel = features + TAPS * RANGE + fixup + doubling + TAPS * channels
    return Cost(
        flops=2 * pixels * per_pixel,
        activations=batch * height * width * channels + pixels * (COLOURS + channels),
    )


def window_cost(levels: Sequence[LevelShape], *, batch: int, side: int, queries: int, channels: int) -> Cost:
    """Window attention over `levels`; queries are shared by the crops of a call."""
    windows, flops, elements = side * side, 0, 0
    for height, width, bins_y, bins_x in levels:
        rows = bins_y * bins_x
        pooling = np.count_nonzero(roi_align(height, bins_y, side)) * np.count_nonzero(
            roi_align(width, bins_x, side)
        )
        flops += 2 * batch * int(pooling) * channels
        flops += 2 * 2 * batch * windows * rows * queries * channels  # scores, and mixing
        elements += batch * height * width * (channels + 1)
        elements += windows * queries * (channels + 2)
        elements += batch * windows * queries * (channels + 2)
    return Cost(flops, activations=elements + windows * queries * windows)


def image_costs() -> dict[str, Cost]:
    """What both ops cost for one 1008x672 image at real size, levels 1x, 2x and 4x, selective grids."""
    jbu = window = Cost()
    for batch, rows, cols in CROPS:
        for scale in SCALES[:-1]:
            jbu += jbu_cost(batch, rows * scale, cols * scale, CHANNELS)
        levels = [LevelShape(rows * s, cols * s, *bin_grid(rows, cols, s, "selective")) for s in SCALES]
        window += window_cost(levels, batch=batch, side=SIDE, queries=QUERIES, channels=CHANNELS)
    return {"JBU": jbu, "WindowAttention": window}


def note(op: str) -> str:
    """One line: what `op` costs for one image in float16, and its floor on each device."""
    cost = image_costs()[op]
    floors = ", ".join(f"{d.name} {1e3 * floor(cost, d):.2f} ms" for d in DEVICES)
    return f"{cost.elements * 2 / 1e6:.0f} MB and {cost.flops / 1e9:.1f} GFLOP; floors: {floors}"


if __name__ == "__main__":
    for op in image_costs():
        print(f"{op}: {note(op)}")
