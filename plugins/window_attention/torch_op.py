"""`torch.ops.uhd.window_attention`: the kernels on CUDA, the reference on a CPU, shapes for torch.compile."""

import torch

from uhd_export.plugins.window_attention import reference
from uhd_export.plugins.window_attention.launch import LEVEL_INPUTS, LevelShape, inputs, outputs, plan
from uhd_export.plugins.window_attention.operator import WindowAttentionOperator


def reference_outputs(
    query_position: torch.Tensor, levels: list[torch.Tensor], sets: int = 4
) -> list[torch.Tensor]:
    """Window attention; `levels` has the nine tensors of `reference.Level` for each level, in order.

    Returns rows (heads, N, B, sets, C) and moments (heads, N, B, sets, 2) of each level, in order.
    A window must touch no more pixels along an axis than `launch.reach` says, as RoIAlign's do not.
    This is `reference.window_attention` on flat lists; `torch.ops.uhd.window_attention` takes the same.
    """
    mixed = reference.window_attention(_levels(levels), query_position, sets)
    return [part.contiguous() for level in mixed for part in level]


window_attention = torch.library.custom_op(
    "uhd::window_attention", reference_outputs, mutates_args=(), device_types="cpu"
)


def _levels(tensors: list[torch.Tensor]) -> list[reference.Level[torch.Tensor]]:
    step = len(LEVEL_INPUTS)
    return [reference.Level(*tensors[i : i + step]) for i in range(0, len(tensors), step)]


@window_attention.register_fake
def _(query_position: torch.Tensor, levels: list[torch.Tensor], sets: int = 4) -> list[torch.Tensor]:
    windows, queries, _ = query_position.shape
    batch, _, _, channels = levels[0].shape
    shape = (queries // sets, windows, batch, sets)
    return [
        levels[0].new_empty(*shape, last)
        for _ in range(len(levels) // len(LEVEL_INPUTS))
        for last in (channels, 2)
    ]


@window_attention.register_kernel("cuda")
def launch(query_position: torch.Tensor, levels: list[torch.Tensor], sets: int = 4) -> list[torch.Tensor]:
    """Run the Triton kernels; on a CPU only under TRITON_INTERPRET=1. Raises UhdError for unfit inputs."""
    from uhd_export.plugins.torch_launch import DTYPES, check, run
    from uhd_export.plugins.window_attention import kernel

    attributes = {"sets": sets, "levels": len(levels) // len(LEVEL_INPUTS)}
    check(WindowAttentionOperator(), attributes, (query_position, *levels))
    parts = _levels(levels)
    windows, queries, _ = query_position.shape
    batch, _, _, channels = parts[0].features.shape
    launches, scratch = plan(
        [
            LevelShape(p.features.shape[1], p.features.shape[2], p.roi_y.shape[1], p.roi_x.shape[1])
            for p in parts
        ],
        batch=batch,
        side=parts[0].roi_y.shape[0],
        queries=queries,
        sets=sets,
        channels=channels,
        dtype=DTYPES[parts[0].features.dtype],
    )
    shape = (queries // sets, windows, batch, sets)
    results = [parts[0].features.new_empty(*shape, last) for _ in parts for last in (channels, 2)]
    scores = query_position.new_empty(scratch.elements, dtype=torch.float32)
    arguments = (tensor.contiguous() for tensor in (query_position, *levels))
    tensors = dict(zip(inputs(len(parts)), arguments, strict=True))
    tensors |= dict(zip(outputs(len(parts)), results, strict=True)) | {scratch.name: scores}
    run(kernel, launches, tensors)
    return results
