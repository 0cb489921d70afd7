"""`uhd.JBU` for TensorRT: shapes and launch plans (see `uhd_export.plugins.tensorrt.plugin`)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from uhd_export.plugins.jbu.launch import INPUTS, OUTPUTS, plan
from uhd_export.plugins.launch import Launch, Scratch
from uhd_export.plugins.operator import Dims, Operator, Shape, ShapeRanges

WEIGHTS: dict[str, tuple[int | None, ...]] = {
    "range_in_weight": (3, 32),
    "range_in_bias": (32,),
    "range_out_weight": (32, 32),
    "range_out_bias": (32,),
    "range_temp": (),
    "sigma_spatial": (),
    "fixup_in_weight": (52, 49),
    "fixup_in_bias": (49,),
    "fixup_out_weight": (49, 49),
    "fixup_out_bias": (49,),
}


class JbuOperator(Operator):
    """One stage: source (B, h, w, C) and guidance (B, 2h, 2w, 3) to (B, 2h, 2w, C)."""

    name = "JBU"
    folder = "jbu"
    attributes: Mapping[str, int | None] = {}

    def inputs(self, attributes: Mapping[str, int]) -> tuple[str, ...]:
        """As `launch.INPUTS`."""
        return INPUTS

    def outputs(self, attributes: Mapping[str, int]) -> tuple[str, ...]:
        """One."""
        return OUTPUTS

    def ranks(self, attributes: Mapping[str, int]) -> tuple[int, ...]:
        """Four for maps, two for matrices, none for the two scalars."""
        return (4, 4, *map(len, WEIGHTS.values()), 2, 2)

    def fixed(self, attributes: Mapping[str, int]) -> Iterable[tuple[str, int]]:
        """The channels."""
        return [("source", 3)]

    def output_shapes(
        self, shapes: Mapping[str, Sequence[Any]], attributes: Mapping[str, int], dims: Dims
    ) -> list[list[Any]]:
        """Twice the source's height and width."""
        batch, height, width, channels = shapes["source"]
        two = dims.constant(2)
        return [[batch, dims.product(height, two), dims.product(width, two), channels]]

    def plan(
        self, shapes: Mapping[str, Shape], attributes: Mapping[str, int], dtype: str
    ) -> tuple[tuple[Launch, ...], tuple[Scratch, ...]]:
        """From the source's shape."""
        batch, height, width, channels = shapes["source"]
        return plan(batch, height, width, channels, dtype)

    def variants(self, shapes: ShapeRanges, attributes: Mapping[str, int], dtype: str) -> Iterable[Launch]:
        """The same two kernels serve all shapes."""
        return self.plan(shapes.max, attributes, dtype)[0]

    def expected(
        self, shapes: Mapping[str, Sequence[int | None]], attributes: Mapping[str, int]
    ) -> dict[str, tuple[int | None, ...]]:
        """Weights have the released model's sizes; maps follow from the source."""
        batch, height, width, _ = shapes["source"]
        high, wide = (None if size is None else 2 * size for size in (height, width))
        return WEIGHTS | {
            "guidance": (batch, high, wide, 3),
            "upsample_y": (None if high is None else high + 6, height),
            "upsample_x": (None if wide is None else wide + 6, width),
        }
