"""The GPU kernels at real size: against their references first, then against the roofline and PyTorch.

For each op and each batch of equal crops of a 1008x672 image: the kernel's error, then the median time
of the kernel, of the reference in eager PyTorch and under torch.compile, and the kernel's time over its
floor (`uhd_export.plugins.roofline`, from the data sheet where the GPU is known, else a measured copy). Timed
is the GPU's own work: it flushes its L2 cache while the host queues the call. Needs a CUDA GPU and PyTorch
built for it.

    python benchmarks/kernels.py [--dtype float16] [--repeats 30] [--json FILE]
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from attempts import attempt, failures, require

from uhd_export.plugins.jbu import torch_op as jbu
from uhd_export.plugins.jbu.launch import INPUTS
from uhd_export.plugins.roofline import (
    CHANNELS,
    CROPS,
    HEADS,
    KNOWN_DEVICES,
    SCALES,
    SIDE,
    SIZE,
    Device,
    floor,
    jbu_cost,
    levels_of,
    window_cost,
)
from uhd_export.plugins.window_attention import torch_op as window
from uhd_export.plugins.window_attention.launch import SETS
from uhd_export.plugins.window_attention.reference import Level
from uhd_export.runtime.image.geometry import bicubic, crop_geometry, reflect_pad
from uhd_export.runtime.profiling.costs import Cost

TOLERANCE = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 1e-2}  # |a - b| / |b|
FLUSH_BYTES = 256 << 20
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Tensors = list[torch.Tensor]


class Case(NamedTuple):
    """One call of one op: what to call, what it must equal, and what it must do at least."""

    name: str
    kernel: Callable[..., Tensors]
    eager: Callable[..., Tensors]
    inputs: Tensors
    cost: Cost


def jbu_kernel(*inputs: torch.Tensor) -> Tensors:
    """The custom op, as a list."""
    return [torch.ops.uhd.jbu(*inputs)]


def jbu_eager(*inputs: torch.Tensor) -> Tensors:
    """The reference: what the released code computes."""
    return [jbu.reference(*inputs)]


def window_kernel(*inputs: torch.Tensor) -> Tensors:
    """The custom op."""
    return [torch.ops.uhd.window_attention(*inputs[:3], list(inputs[3:]))]


def window_eager(*inputs: torch.Tensor) -> Tensors:
    """The reference: pool, score, mix, multiply by the values."""
    return [window.reference_output(*inputs[:3], list(inputs[3:]))]


def jbu_case(batch: int, rows: int, cols: int, channels: int, dtype: torch.dtype, device: str) -> Case:
    """A stage with random weights of about unit gain."""
    generator = torch.Generator().manual_seed(rows)

    def normal(*shape: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * gain

    values = {
        "source": normal(batch, rows, cols, channels),
        "guidance": normal(batch, 2 * rows, 2 * cols, 3),
        "range_in_weight": normal(3, 32),
        "range_in_bias": normal(32),
        "range_out_weight": normal(32, 32, gain=32**-0.5),
        "range_out_bias": normal(32),
        "range_temp": torch.tensor(-1.0),
        "sigma_spatial": torch.tensor(0.7),
        "fixup_in_weight": normal(52, 49, gain=52**-0.5),
        "fixup_in_bias": normal(49),
        "fixup_out_weight": normal(49, 49, gain=49**-0.5),
        "fixup_out_bias": normal(49),
        "upsample_y": torch.tensor(reflect_pad(bicubic(2 * rows, rows), 3)),
        "upsample_x": torch.tensor(reflect_pad(bicubic(2 * cols, cols), 3)),
    }
    inputs = [values[name].to(device, dtype) for name in INPUTS]
    name = f"jbu {batch}x{rows}x{cols} to {2 * rows}x{2 * cols}"
    return Case(name, jbu_kernel, jbu_eager, inputs, jbu_cost(batch, rows, cols, channels))


def window_case(
    batch: int,
    rows: int,
    cols: int,
    channels: int,
    heads: int,
    size: int,
    side: int,
    dtype: torch.dtype,
    device: str,
) -> Case:
    """All levels of `batch` equal crops, with random features and queries."""
    generator = torch.Generator().manual_seed(rows)
    geometry = crop_geometry(rows, cols, levels=SCALES, side=side)
    windows, queries, shapes, levels = side * side, SETS * heads, levels_of(rows, cols), []
    for scale, shape in zip(SCALES, shapes, strict=True):
        levels += Level(
            torch.randn(batch, shape.height, shape.width, channels, generator=generator),
            torch.rand(batch, shape.height, shape.width, generator=generator) + 0.5,
            *(torch.tensor(geometry[f"roi_{scale}x_{axis}"]) for axis in "yx"),
            torch.randn(windows, channels, queries, generator=generator) * channels**-0.5,
            torch.randn(windows, queries, generator=generator),
            torch.randn(windows, queries, generator=generator),
        )
    position = torch.randn(windows, sum(shape.rows for shape in shapes), queries, generator=generator)
    value = torch.randn(len(SCALES), heads, channels, size, generator=generator) * channels**-0.5
    value_moments = torch.randn(len(SCALES), heads, 2, size, generator=generator)
    cost = window_cost(shapes, batch=batch, side=side, heads=heads, size=size, channels=channels)
    inputs = [tensor.to(device, dtype) for tensor in (position, value, value_moments, *levels)]
    return Case(f"window attention {batch}x{rows}x{cols}", window_kernel, window_eager, inputs, cost)


def cases(dtype: torch.dtype, device: str = "cuda") -> list[Case]:
    """Every call that one 1008x672 image needs."""
    cases = []
    for batch, rows, cols in CROPS:
        for scale in SCALES[:-1]:
            cases.append(jbu_case(batch, rows * scale, cols * scale, CHANNELS, dtype, device))
        cases.append(window_case(batch, rows, cols, CHANNELS, HEADS, SIZE, SIDE, dtype, device))
    return cases


def error(case: Case) -> float:
    """The largest |kernel - reference| / |reference| of the outputs, the reference in float32."""
    actual = case.kernel(*case.inputs)
    expected = case.eager(*(tensor.float() for tensor in case.inputs))
    pairs = zip(actual, expected, strict=True)
    return max(((a.float() - e).norm() / e.norm()).item() for a, e in pairs)


def milliseconds(call: Callable[[], object], repeats: int) -> dict[str, float]:
    """Median, shortest and longest time of what `call` has the GPU do, its inputs no longer in the L2 cache.

    Flushing takes the GPU longer than the host needs to queue the call, so that no launch is waited for.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    call()
    queueing = 1e3 * (time.perf_counter() - begun)
    flushes = math.ceil(2 * queueing / gpu_time(flush.zero_))

    def prepare() -> None:
        for _ in range(flushes):
            flush.zero_()

    times = [gpu_time(call, prepare) for _ in range(repeats)]
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}


def gpu_time(call: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> float:
    """Milliseconds between the GPU's end of `prepare` and its end of `call`."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    prepare()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def find_device(name: str) -> Device:
    """Data-sheet figures of the GPU called `name`, or its measured copy bandwidth and no bound on FLOPs."""
    for device in KNOWN_DEVICES:
        if device.name.split()[-1].lower() in name.lower():
            return device
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    copied = milliseconds(source.clone, 10)["median"]
    return Device(f"{name} (measured copy)", 2 * source.numel() / copied * 1e3, float("inf"))


def measure(case: Case, dtype: str, device: Device, repeats: int) -> dict:
    """One row: error, times, and the kernel's time over its floor. Raises Wrong where the kernel is wrong."""
    off = require(case.name, error(case), TOLERANCE[dtype])
    torch.compiler.reset()  # else the second shape makes it compile for any
    compiled = torch.compile(case.eager, dynamic=False)
    calls = {"kernel": case.kernel, "eager": case.eager, "compiled": compiled}
    times = {name: milliseconds(lambda c=call: c(*case.inputs), repeats) for name, call in calls.items()}
    least = 1e3 * floor(case.cost, device, case.inputs[0].element_size())
    return {
        "error": off,
        "floor_ms": least,
        "over_floor": times["kernel"]["median"] / least,
        **{f"{name}_ms": time for name, time in times.items()},
        "speedup_eager": times["eager"]["median"] / times["kernel"]["median"],
        "speedup_compiled": times["compiled"]["median"] / times["kernel"]["median"],
    }


def measure_all(dtype: str, device: Device, repeats: int) -> list[dict]:
    """A row for every call that one 1008x672 image needs, or what failed in its place."""
    rows = []
    for case in cases(DTYPES[dtype]):
        rows.append({"case": case.name, **attempt(lambda c=case: measure(c, dtype, device, repeats))})
    return rows


def main() -> None:
    """Measure and print one JSON object; the exit status tells whether everything was right."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", type=Path, help="also write the result here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/kernels.py needs a CUDA GPU and PyTorch built for CUDA; none is at hand")
    torch.set_grad_enabled(False)
    name = torch.cuda.get_device_name()
    device = find_device(name)
    rows = measure_all(arguments.dtype, device, arguments.repeats)
    result = {
        "machine": name,
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "floor_of": device.name,
        "dtype": arguments.dtype,
        "torch": torch.__version__,
        "cases": rows,
    }
    text = json.dumps(result)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    if failed := list(failures(rows)):
        sys.exit("; ".join(failed))


if __name__ == "__main__":
    main()
