"""Runs launch plans on PyTorch tensors with Triton's own launcher, or with its interpreter on a CPU."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from types import ModuleType

import torch

from uhd_export.plugins.launch import Launch, Scratch
from uhd_export.plugins.operator import Operator, check_shapes
from uhd_export.plugins.tiles import INTERPRETED
from uhd_export.runtime.errors import UhdError

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def check(operator: Operator, attributes: Mapping[str, int], inputs: Sequence[torch.Tensor]) -> None:
    """Raise UhdError where kernels could not run on `inputs`, or would read beyond them."""
    check_shapes(operator, attributes, [tuple(tensor.shape) for tensor in inputs])
    for name, tensor in zip(operator.inputs(attributes), inputs, strict=True):
        if tensor.dtype not in DTYPES or tensor.device != inputs[0].device:
            raise UhdError(
                f"operator {operator.name}: input {name} is {tensor.dtype} on {tensor.device}; it must be "
                f"float32, float16 or bfloat16 on {inputs[0].device}"
            )


def buffers(scratch: Sequence[Scratch], device: torch.device) -> dict[str, torch.Tensor]:
    """The scratch buffers by name."""
    return {
        one.name: torch.empty(one.elements, dtype=getattr(torch, one.dtype), device=device) for one in scratch
    }


def run(kernels: ModuleType, launches: Sequence[Launch], tensors: Mapping[str, torch.Tensor]) -> None:
    """Run `launches` in order. `tensors` has every input, output and scratch buffer by name, contiguous."""
    device = next(iter(tensors.values())).device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for launch in launches:
            function = getattr(kernels, launch.kernel)
            arguments = [tensors[name] for name in launch.tensors]
            options = dict(launch.constants)
            if "EMULATE" in function.arg_names:
                options["EMULATE"] = INTERPRETED and any(t.dtype == torch.bfloat16 for t in arguments)
            if launch.registers and not INTERPRETED:
                options["maxnreg"] = launch.registers
            options |= {"num_warps": launch.warps, "num_stages": launch.stages}
            function[launch.grid](*arguments, *launch.integers, **options)
