"""`torch.ops.uhd.jbu`: the kernel on CUDA, the reference on a CPU, shapes for torch.compile."""

import torch

from uhd_export.plugins.jbu.launch import INPUTS, OUTPUTS, plan
from uhd_export.plugins.jbu.operator import JbuOperator
from uhd_export.plugins.jbu.reference import apply_kernels, stage_kernels


def reference(
    source: torch.Tensor,
    guidance: torch.Tensor,
    range_in_weight: torch.Tensor,
    range_in_bias: torch.Tensor,
    range_out_weight: torch.Tensor,
    range_out_bias: torch.Tensor,
    range_temp: torch.Tensor,
    sigma_spatial: torch.Tensor,
    fixup_in_weight: torch.Tensor,
    fixup_in_bias: torch.Tensor,
    fixup_out_weight: torch.Tensor,
    fixup_out_bias: torch.Tensor,
    upsample_y: torch.Tensor,
    upsample_x: torch.Tensor,
) -> torch.Tensor:
    """One JBU stage: `source` (B, h, w, C) and `guidance` (B, 2h, 2w, 3) to (B, 2h, 2w, C).

    Weights are (in, out); `upsample_y` (2h + 6, h) and `upsample_x` (2w + 6, w) hold bicubic doubling
    with reflect padding, as `uhd_export.runtime.image.geometry` computes them. Data in float32, float16 or
    bfloat16. This is `uhd_export.plugins.jbu.reference`, with the inputs of the operator;
    `torch.ops.uhd.jbu` takes the same.
    """
    kernels = stage_kernels(
        guidance,
        (range_in_weight.T, range_in_bias),
        (range_out_weight.T, range_out_bias),
        range_temp,
        sigma_spatial,
        (fixup_in_weight.T, fixup_in_bias),
        (fixup_out_weight.T, fixup_out_bias),
    )
    return apply_kernels(source, kernels, upsample_y.float(), upsample_x.float()).contiguous()


jbu = torch.library.custom_op("uhd::jbu", reference, mutates_args=(), device_types="cpu")


@jbu.register_fake
def _(source: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    batch, height, width, channels = source.shape
    return source.new_empty(batch, 2 * height, 2 * width, channels)


@jbu.register_kernel("cuda")
def launch(*inputs: torch.Tensor) -> torch.Tensor:
    """Run the Triton kernels; on a CPU only under TRITON_INTERPRET=1. Raises UhdError for unfit inputs."""
    from uhd_export.plugins.jbu import kernel
    from uhd_export.plugins.torch_launch import DTYPES, buffers, check, run

    check(JbuOperator(), {}, inputs)
    source = inputs[0]
    batch, height, width, channels = source.shape
    output = source.new_empty(batch, 2 * height, 2 * width, channels)
    launches, scratch = plan(batch, height, width, channels, DTYPES[source.dtype])
    tensors = {name: tensor.contiguous() for name, tensor in zip(INPUTS, inputs, strict=True)}
    run(kernel, launches, tensors | {OUTPUTS[0]: output} | buffers(scratch, source.device))
    return output
