"""GPTQ is never worse than rounding: a linear that it makes worse is rounded instead, and named."""

import importlib.metadata

import pytest
import torch
from torch import nn

from uhd_export.calibration.gptq import better
from uhd_export.calibration.options import GptqOptions
from uhd_export.calibration.quality import output_error
from uhd_export.calibration.solver import GroupSolver
from uhd_export.checkpoint.int4.weight import round_to_nearest

try:
    importlib.metadata.version("gptqmodel")
    INSTALLED = True
except importlib.metadata.PackageNotFoundError:
    INSTALLED = False
OPTIONS = GptqOptions(group=32)


@pytest.mark.skipif(not INSTALLED, reason="gptqmodel is not installed")
@pytest.mark.parametrize(
    "shape, rounds",
    [
        (lambda weight: weight, False),
        (lambda weight: weight.abs(), True),
        (lambda weight: weight * (weight > 1.75), True),  # 96 % zeros, the others positive
        (lambda weight: -weight.abs(), False),
    ],
    ids=["normal", "positive", "sparse", "negative"],
)
def test_the_smaller_error_wins(shape, rounds):
    random = torch.Generator().manual_seed(0)
    mix = torch.randn(32, 128, generator=random)

    def inputs(rows):
        latent = torch.randn(rows, 32, generator=random)
        return latent @ mix + 0.2 * torch.randn(rows, 128, generator=random)

    linear = nn.Linear(128, 64, bias=False).requires_grad_(False)
    linear.weight.data = shape(torch.randn(64, 128, generator=random))
    dense, held_out = linear.weight.clone(), inputs(300)
    solver = GroupSolver({"q": linear}, OPTIONS, 600)
    solver.add(inputs(600))
    solved = solver.solve()["q"]
    rounded = torch.from_numpy(round_to_nearest(dense.numpy(), 32).dequantize())
    rtn_error = output_error(held_out, dense, rounded)
    best, error = better(solved, dense, held_out, rtn_error, OPTIONS)
    assert error <= rtn_error
    assert error == output_error(held_out, dense, torch.from_numpy(best.weight.dequantize()))
    assert (best.fallback is not None) == rounds
    if rounds:
        assert best.fallback.startswith("rounding to the nearest measured better, ")
        assert output_error(held_out, dense, torch.from_numpy(solved.weight.dequantize())) > rtn_error
