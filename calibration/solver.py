"""GPTQ of one group of linear layers, by gptqmodel's solver (arXiv 2210.17323)."""

import contextlib
import copy
import importlib.metadata
import io
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from uhd_export.calibration.options import GptqOptions
from uhd_export.checkpoint.int4.weight import QuantizedWeight, round_to_nearest
from uhd_export.runtime.errors import UhdError

LIBRARY = "gptqmodel"
# A linear that saw a smaller share of the calibration tokens is rounded instead.
FALLBACK = "0.5%"


@dataclass(frozen=True)
class Solved:
    """One quantized linear: how many tokens it saw, and why it was rounded instead, if so."""

    weight: QuantizedWeight
    samples: int
    fallback: str | None


def library_version() -> str:
    """gptqmodel's version. Raises UhdError with the install line where it is missing."""
    try:
        return importlib.metadata.version(LIBRARY)
    except importlib.metadata.PackageNotFoundError:
        raise UhdError(
            "GPTQ needs the package gptqmodel: pip install 'uhd-export[gptq]'; "
            "--weights int4-rtn needs neither it nor calibration"
        ) from None


def _library() -> Any:
    """gptqmodel's quantization module, imported without its banner and the warnings of what it imports."""
    library_version()
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            from gptqmodel import quantization
            from gptqmodel.utils.logger import setup_logger

            setup_logger().setLevel(logging.ERROR)
    finally:
        logging.disable(disabled)
    return quantization


class GroupSolver:
    """Quantizes linears that see the same input: add all their input rows, then solve once."""

    def __init__(self, linears: dict[str, nn.Linear], options: GptqOptions, expected: int) -> None:
        """`linears` by name; `expected` is the number of rows that a layer should see in all."""
        library = _library()
        config = library.QuantizeConfig(
            bits=4,
            group_size=options.group_size,
            sym=options.symmetric,
            desc_act=options.act_order,
            act_group_aware=not options.act_order,
            damp_percent=options.damp,
            fallback=library.Fallback(strategy="rtn", threshold=FALLBACK),
            offload_to_disk=False,
        )
        self._options, self._linears = options, linears
        self._tasks: dict[str, Any] = {}
        for name, linear in linears.items():
            # The solver marks a failure in its configuration, so each has its own.
            task = library.GPTQ(linear, copy.deepcopy(config))
            task.quantizer.configure(perchannel=True)
            task.expected_nsamples = expected
            self._tasks[name] = task

    def add(self, rows: torch.Tensor) -> None:
        """Count input rows (T, K); the first linear keeps the statistics for all."""
        next(iter(self._tasks.values())).add_batch(rows, rows)

    def solve(self) -> dict[str, Solved]:
        """The quantized weights; the solver's memory is free afterwards."""
        (first, leader), *others = self._tasks.items()
        solved = {}
        for name, task in others:
            task.adopt_hessian_from(leader)
            solved[name] = self._solve(name, task)
        solved[first] = self._solve(first, leader)
        return {name: solved[name] for name in self._linears}

    def _solve(self, name: str, task: Any) -> Solved:
        dense = self._linears[name].weight
        with contextlib.redirect_stdout(io.StringIO()):
            values, scales, zeros, g_idx, _, loss, _, samples = task.quantize()
        failed, expected = task.qcfg.mock_quantization, task.expected_nsamples
        task.free()
        if not failed and not isinstance(loss, str):
            return Solved(_weight(values, scales, zeros, g_idx), samples, None)
        rounded = round_to_nearest(dense.numpy(), self._options.group_size, symmetric=self._options.symmetric)
        # The library's name for a linear that saw too little.
        few = isinstance(loss, str) and loss.startswith("fallback(")
        reason = (
            f"saw {samples:,} of {expected:,} tokens" if few else "its statistics could not be factorised"
        )
        return Solved(rounded, samples, reason)


def _weight(
    values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, g_idx: torch.Tensor
) -> QuantizedWeight:
    """Integers from the solver's float values (N, K), scales and zero points (N, G), and groups (K,).

    Values lie on the grid of the float32 scales, which is how the integers are found again; the scales
    kept are float16, as they will be stored.
    """
    index = g_idx.long()
    integers = torch.round(values.float() / scales[:, index]) + zeros[:, index]
    codes, order = integers.clamp_(0, 15).to(torch.uint8).numpy(), None
    if not torch.equal(index, torch.arange(len(index)) // (len(index) // scales.shape[1])):
        order = np.argsort(index.numpy(), kind="stable")
        codes = np.ascontiguousarray(codes[:, order])
    stored = scales.to(torch.float16).float().numpy()
    if not np.isfinite(stored).all():
        raise UhdError("weight: holds values that float16 scales cannot represent; is the checkpoint broken?")
    return QuantizedWeight(codes, stored, zeros.to(torch.uint8).numpy(), 4, order)
