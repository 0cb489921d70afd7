"""What the ops must move and multiply at least, and the time below which no kernel can go.

Bytes count every input once and every output once per call; FLOPs are those of the op's definition, 2
a multiply-add: what an implementation adds (halos, composed stencils, padded tiles) is not in them. The
floor is the longer of bytes over memory bandwidth and FLOPs over the tensor cores' dense float16 peak.

`python -m uhd_export.plugins.roofline` prints the floors of one 1008x672 image: six 24x24 crops in one
call, the 19x29 overview in another; and what each kernel of window attention adds to the op by its buffers.
"""

from collections.abc import Sequence

import numpy as np

from uhd_export.plugins.window_attention.launch import SETS, LevelShape
from uhd_export.runtime.image.geometry import bin_grid, roi_align
from uhd_export.runtime.profiling.costs import Cost
from uhd_export.runtime.profiling.devices import KNOWN_DEVICES, Device

TAPS, RANGE, COLOURS, FIXUP_IN = 49, 32, 3, 52
CROPS = ((6, 24, 24), (1, 19, 29))  # batch, rows, columns of patches at 1008x672
SCALES = (1, 2, 4)
DEVICES = tuple(d for d in KNOWN_DEVICES if d.name in ("H200", "RTX 4090", "Jetson AGX Orin"))
SIDE, CHANNELS, HEADS, SIZE = 12, 1024, 32, 128  # ViT-L and Vicuna-7B


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


def window_cost(
    levels: Sequence[LevelShape], *, batch: int, side: int, heads: int, size: int, channels: int
) -> Cost:
    """Window attention over `levels`; queries and values are shared by the crops of a call."""
    kernels = window_kernels(levels, batch=batch, side=side, heads=heads, size=size, channels=channels)
    windows, queries, total = side * side, SETS * heads, sum(level.rows for level in levels)
    pixels = sum(height * width for height, width, *_ in levels)
    elements = batch * pixels * (channels + 1) + windows * total * queries
    elements += len(levels) * (windows * queries + heads * size) * (channels + 2)
    elements += batch * windows * SETS * heads * size
    return Cost(sum(cost.flops for cost in kernels.values()), activations=elements)


def window_kernels(
    levels: Sequence[LevelShape], *, batch: int, side: int, heads: int, size: int, channels: int
) -> dict[str, Cost]:
    """What each kernel of window attention does, all levels together, the buffers between them included.

    A kernel reads its inputs once and writes its outputs once; an element of a float32 buffer counts as two.
    """
    windows, queries, total = side * side, SETS * heads, sum(level.rows for level in levels)
    rows = batch * windows * total
    pixels = sum(height * width for height, width, *_ in levels)
    taps = sum(
        np.count_nonzero(roi_align(level.height, level.bins_y, side))
        * np.count_nonzero(roi_align(level.width, level.bins_x, side))
        for level in levels
    )
    pooled, moments, scores = rows * channels, 2 * 2 * rows, 2 * rows * queries
    parameters = len(levels) * (channels + 2)
    values = batch * windows * SETS * len(levels) * channels * heads * size
    return {
        "window_pool": Cost(
            2 * batch * int(taps) * channels, 0, batch * pixels * (channels + 1) + pooled + moments
        ),
        "window_scores": Cost(
            2 * rows * queries * channels,
            windows * queries * parameters,
            pooled + moments + windows * total * queries + scores,
        ),
        "window_softmax": Cost(0, 0, 2 * scores),
        "window_values": Cost(
            2 * rows * queries * channels + 2 * values,
            heads * size * parameters,
            pooled + moments + scores + batch * windows * SETS * heads * size,
        ),
    }


def image_costs() -> dict[str, Cost]:
    """What both ops cost for one 1008x672 image at real size, levels 1x, 2x and 4x, selective grids."""
    jbu = window = Cost()
    for batch, rows, cols in CROPS:
        for scale in SCALES[:-1]:
            jbu += jbu_cost(batch, rows * scale, cols * scale, CHANNELS)
        window += window_cost(
            levels_of(rows, cols), batch=batch, side=SIDE, heads=HEADS, size=SIZE, channels=CHANNELS
        )
    return {"JBU": jbu, "WindowAttention": window}


def image_kernels() -> dict[str, Cost]:
    """What the kernels of window attention do for one 1008x672 image at real size."""
    kernels: dict[str, Cost] = {}
    for batch, rows, cols in CROPS:
        for name, cost in window_kernels(
            levels_of(rows, cols), batch=batch, side=SIDE, heads=HEADS, size=SIZE, channels=CHANNELS
        ).items():
            kernels[name] = kernels.get(name, Cost()) + cost
    return kernels


def levels_of(rows: int, cols: int) -> list[LevelShape]:
    """Levels of a crop of patches, selective grids."""
    return [LevelShape(rows * s, cols * s, *bin_grid(rows, cols, s, "selective")) for s in SCALES]


def note(op: str) -> str:
    """One line: what `op` costs for one image in float16, and its floor on each device."""
    cost = image_costs()[op]
    floors = ", ".join(f"{d.name} {1e3 * floor(cost, d):.2f} ms" for d in DEVICES)
    return f"{cost.elements * 2 / 1e6:.0f} MB and {cost.flops / 1e9:.1f} GFLOP; floors: {floors}"


if __name__ == "__main__":
    for op in image_costs():
        print(f"{op}: {note(op)}")
    for name, cost in image_kernels().items():
        print(f"  {name}: {cost.elements * 2 / 1e6:.0f} MB and {cost.flops / 1e9:.1f} GFLOP")
