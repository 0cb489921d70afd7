"""How an image is cut, as boxes to draw over it."""

from uhd_export.runtime.image.layout import visual_token_count
from uhd_export.runtime.image.slicing import Size, plan_slices
from uhd_export.runtime.serving.http.schema import PlanAnswer
from uhd_export.runtime.settings import Settings


def describe_plan(size: Size, settings: Settings, side: int) -> PlanAnswer:
    """The plan of an image of `size`; `side` are the tokens an axis of a crop. Raises UhdError."""
    plan = plan_slices(
        size,
        max_slices=settings.max_slices,
        resize=settings.resize,
        upscale_only=settings.upscale_only,
    )
    cols, rows = plan.slice_grid or (0, 0)
    boxes = [
        (col / cols, row / rows, (col + 1) / cols, (row + 1) / rows)
        for row in range(rows)
        for col in range(cols)
    ]
    return PlanAnswer(
        width=size[0],
        height=size[1],
        slice_grid=plan.slice_grid,
        slice_size=plan.slice_size,
        overview_size=plan.overview_size,
        boxes=boxes,
        crops=cols * rows + 1,
        visual_tokens=visual_token_count(plan.slice_grid, layout=settings.layout, side=side),
    )
