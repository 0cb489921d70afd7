"""`uhd.WindowAttention` for TensorRT: shapes and launch plans (see `uhd_export.plugins.tensorrt.plugin`)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from uhd_export.plugins.launch import Launch, Scratch
from uhd_export.plugins.operator import Dims, Operator, Shape, ShapeRanges
from uhd_export.plugins.window_attention.launch import (
    LEVEL_INPUTS,
    OUTPUTS,
    SETS,
    LevelShape,
    inputs,
    plan,
)

RANKS = (4, 3, 3, 3, 3, 2, 2)  # of `launch.LEVEL_INPUTS`


class WindowAttentionOperator(Operator):
    """Attention of folded queries in every window; letters as in `reference`."""

    name = "WindowAttention"
    folder = "window_attention"
    attributes: Mapping[str, int | None] = {"levels": None}

    def inputs(self, attributes: Mapping[str, int]) -> tuple[str, ...]:
        """Position scores and values, then seven a level."""
        return inputs(attributes["levels"])

    def outputs(self, attributes: Mapping[str, int]) -> tuple[str, ...]:
        """One."""
        return OUTPUTS

    def ranks(self, attributes: Mapping[str, int]) -> tuple[int, ...]:
        """Of the three that levels share, then RANKS."""
        return (3, 4, 4, *RANKS * attributes["levels"])

    def fixed(self, attributes: Mapping[str, int]) -> Iterable[tuple[str, int]]:
        """Windows, channels, heads and their size."""
        return [("position", 0), ("features_0", 3), ("roi_y_0", 0), ("value", 1), ("value", 3)]

    def output_shapes(
        self, shapes: Mapping[str, Sequence[Any]], attributes: Mapping[str, int], dims: Dims
    ) -> list[list[Any]]:
        """(B, N, sets, heads * size)."""
        _, heads, _, size = shapes["value"]
        sets = dims.constant(SETS)
        return [[shapes["features_0"][0], shapes["position"][0], sets, dims.product(heads, size)]]

    def plan(
        self, shapes: Mapping[str, Shape], attributes: Mapping[str, int], dtype: str
    ) -> tuple[tuple[Launch, ...], tuple[Scratch, ...]]:
        """From the shapes of the maps, the RoI matrices and the values."""
        batch, _, _, channels = shapes["features_0"]
        _, heads, _, size = shapes["value"]
        levels = []
        for i in range(attributes["levels"]):
            _, height, width, _ = shapes[f"features_{i}"]
            levels.append(LevelShape(height, width, shapes[f"roi_y_{i}"][1], shapes[f"roi_x_{i}"][1]))
        return plan(
            levels,
            batch=batch,
            side=shapes["roi_y_0"][0],
            heads=heads,
            size=size,
            channels=channels,
            dtype=dtype,
        )

    def variants(self, shapes: ShapeRanges, attributes: Mapping[str, int], dtype: str) -> Iterable[Launch]:
        """The same four kernels serve all shapes."""
        launches, _ = self.plan(shapes.max, attributes, dtype)
        return {launch.kernel: launch for launch in launches}.values()

    def expected(
        self, shapes: Mapping[str, Sequence[int | None]], attributes: Mapping[str, int]
    ) -> dict[str, tuple[int | None, ...]]:
        """Levels share crops, channels and windows; matrices fit their level's map."""
        windows, _, queries = shapes["position"]
        side = None if windows is None else math.isqrt(windows)
        heads = None if queries is None else queries // SETS
        batch, _, _, channels = shapes["features_0"]
        levels, size = attributes["levels"], shapes["value"][3]
        expected: dict[str, tuple[int | None, ...]] = {}
        total: int | None = 0
        for i in range(levels):
            _, height, width, _ = shapes[f"features_{i}"]
            bins_y, bins_x = shapes[f"roi_y_{i}"][1], shapes[f"roi_x_{i}"][1]
            total = None if None in (total, bins_y, bins_x) else total + bins_y * bins_x  # type: ignore
            level = (
                (batch, height, width, channels),
                (batch, height, width),
                (side, bins_y, height),
                (side, bins_x, width),
                (windows, channels, queries),
                (windows, queries),
                (windows, queries),
            )
            expected |= {f"{name}_{i}": shape for name, shape in zip(LEVEL_INPUTS, level, strict=True)}
        return expected | {
            "position": (side and side * side, total, heads and SETS * heads),
            "value": (levels, heads, channels, size),
            "value_moments": (levels, heads, 2, size),
        }
