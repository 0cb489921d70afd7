"""`torch.ops.uhd.window_attention`: the kernels on CUDA, the reference on a CPU, shapes for torch.compile."""

import torch

from uhd_export.plugins.window_attention import reference
from uhd_export.plugins.window_attention.launch import LEVEL_INPUTS, OUTPUTS, SETS, inputs
from uhd_export.plugins.window_attention.operator import WindowAttentionOperator


def reference_output(
    position: torch.Tensor, value: torch.Tensor, value_moments: torch.Tensor, levels: list[torch.Tensor]
) -> torch.Tensor:
    """Window attention; `levels` has the seven tensors of `reference.Level` for each level, in order.

    Returns (B, N, sets, heads * size). This is `reference.window_attention` on flat lists;
    `torch.ops.uhd.window_attention` takes the same.
    """
    step = len(LEVEL_INPUTS)
    parts = [reference.Level(*levels[i : i + step]) for i in range(0, len(levels), step)]
    return reference.window_attention(parts, position, value, value_moments).contiguous()


window_attention = torch.library.custom_op(
    "uhd::window_attention", reference_output, mutates_args=(), device_types="cpu"
)


@window_attention.register_fake
def _(
    position: torch.Tensor, value: torch.Tensor, value_moments: torch.Tensor, levels: list[torch.Tensor]
) -> torch.Tensor:
    _, heads, _, size = value.shape
    return levels[0].new_empty(levels[0].shape[0], position.shape[0], SETS, heads * size)


@window_attention.register_kernel("cuda")
def launch(
    position: torch.Tensor, value: torch.Tensor, value_moments: torch.Tensor, levels: list[torch.Tensor]
) -> torch.Tensor:
    """Run the Triton kernels; on a CPU only under TRITON_INTERPRET=1. Raises UhdError for unfit inputs."""
    from uhd_export.plugins.torch_launch import DTYPES, buffers, check, run
    from uhd_export.plugins.window_attention import kernel

    operator, attributes = WindowAttentionOperator(), {"levels": len(levels) // len(LEVEL_INPUTS)}
    given = (position, value, value_moments, *levels)
    check(operator, attributes, given)
    named = dict(zip(inputs(attributes["levels"]), (tensor.contiguous() for tensor in given), strict=True))
    shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
    launches, scratch = operator.plan(shapes, attributes, DTYPES[value.dtype])
    _, heads, _, size = value.shape
    attended = value.new_empty(levels[0].shape[0], position.shape[0], SETS, heads * size)
    run(kernel, launches, named | {OUTPUTS[0]: attended} | buffers(scratch, value.device))
    return attended
