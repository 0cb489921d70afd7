"""`uhd.WindowAttention` for TensorRT: shapes and launch plans (see `uhd_export.plugins.tensorrt.plugin`)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from uhd_export.plugins.launch import Launch, Scratch
from uhd_export.plugins.operator import Dims, Operator, Shape, ShapeRanges
from uhd_export.plugins.window_attention.launch import (
    LEVEL_INPUTS,
    PIXELS,
    LevelShape,
    inputs,
    outputs,
    pixels_at_once,
    plan,
)

RANKS = (4, 3, 3, 3, 3, 3, 3, 2, 2)  # of `launch.LEVEL_INPUTS`


class WindowAttentionOperator(Operator):
    """Attention of folded queries in every window; letters as in `reference`."""

    name = "WindowAttention"
    folder = "window_attention"
    attributes: Mapping[str, int | None] = {"sets": 4, "levels": None}

    def inputs(self, attributes: Mapping[str, int]) -> tuple[str, ...]:
        """query_position, then nine a level."""
        return inputs(attributes["levels"])

    def outputs(self, attributes: Mapping[str, int]) -> tuple[str, ...]:
        """Rows and moments of each level."""
        return outputs(attributes["levels"])

    def ranks(self, attributes: Mapping[str, int]) -> tuple[int, ...]:
        """Three for query_position, then RANKS."""
        return (3, *RANKS * attributes["levels"])

    def fixed(self, attributes: Mapping[str, int]) -> Iterable[tuple[str, int]]:
        """Windows, queries and channels."""
        return [("query_position", 0), ("query_position", 1), ("features_0", 3), ("roi_y_0", 0)]

    def output_shapes(
        self, shapes: Mapping[str, Sequence[Any]], attributes: Mapping[str, int], dims: Dims
    ) -> list[list[Any]]:
        """(heads, N, B, sets, C) and (heads, N, B, sets, 2) of each level."""
        windows, queries, _ = shapes["query_position"]
        batch, _, _, channels = shapes["features_0"]
        sets = dims.constant(attributes["sets"])
        shape = [dims.quotient(queries, sets), windows, batch, sets]
        return [[*shape, last] for _ in range(attributes["levels"]) for last in (channels, dims.constant(2))]

    def plan(
        self,
        shapes: Mapping[str, Shape],
        attributes: Mapping[str, int],
        dtype: str,
        pixels: int | None = None,
    ) -> tuple[tuple[Launch, ...], Scratch]:
        """From the maps' and RoI matrices' shapes; `pixels` as in `launch.plan`."""
        batch, _, _, channels = shapes["features_0"]
        return plan(
            _levels(shapes, attributes),
            batch=batch,
            side=shapes["roi_y_0"][0],
            queries=shapes["query_position"][1],
            sets=attributes["sets"],
            channels=channels,
            dtype=dtype,
            pixels=pixels,
        )

    def variants(self, shapes: ShapeRanges, attributes: Mapping[str, int], dtype: str) -> Iterable[Launch]:
        """Kernels differ in the pixels that they take at a time, which grow with the map."""
        side = shapes.max["roi_y_0"][0]
        first, last = (
            choose(pixels_at_once(level, side, dtype) for level in _levels(end, attributes))
            for choose, end in ((min, shapes.min), (max, shapes.max))
        )
        steps = (step for step in PIXELS if first <= step <= last)
        return [launch for step in steps for launch in self.plan(shapes.max, attributes, dtype, step)[0]]

    def expected(
        self, shapes: Mapping[str, Sequence[int | None]], attributes: Mapping[str, int]
    ) -> dict[str, tuple[int | None, ...]]:
        """Levels share crops, channels and windows; matrices fit their level's map."""
        windows, queries, _ = shapes["query_position"]
        side = None if windows is None else math.isqrt(windows)
        batch, _, _, channels = shapes["features_0"]
        expected: dict[str, tuple[int | None, ...]] = {
            "query_position": (side and side * side, queries, windows)
        }
        for i in range(attributes["levels"]):
            _, height, width, _ = shapes[f"features_{i}"]
            bins_y, bins_x = shapes[f"roi_y_{i}"][1], shapes[f"roi_x_{i}"][1]
            level = (
                (batch, height, width, channels),
                (batch, height, width),
                (side, bins_y, height),
                (side, bins_x, width),
                (side, bins_y, side),
                (side, bins_x, side),
                (windows, channels, queries),
                (windows, queries),
                (windows, queries),
            )
            expected |= {f"{name}_{i}": shape for name, shape in zip(LEVEL_INPUTS, level, strict=True)}
        return expected


def _levels(shapes: Mapping[str, Shape], attributes: Mapping[str, int]) -> list[LevelShape]:
    """Height, width and bins of every level."""
    levels = []
    for i in range(attributes["levels"]):
        _, height, width, _ = shapes[f"features_{i}"]
        levels.append(LevelShape(height, width, shapes[f"roi_y_{i}"][1], shapes[f"roi_x_{i}"][1]))
    return levels
