"""What every kernel at real size uses on every target: registers, shared memory, spills.

`python -m uhd_export.plugins.compile` prints it; `--json` for machines, `--dtype` and `--target` to choose.
"""

from collections.abc import Sequence
from dataclasses import asdict

from uhd_export.plugins.compile.compiler import DTYPES, TARGETS, Request, compile_kernels
from uhd_export.plugins.jbu import launch as jbu
from uhd_export.plugins.launch import Launch, Scratch
from uhd_export.plugins.window_attention import launch as window


def types(launch: Launch, scratch: Sequence[Scratch], dtype: str) -> dict[str, str]:
    """Types of a launch's tensors as the exported graph has them: `dtype`, but for the scratch buffers."""
    own = {one.name: one.dtype for one in scratch}
    return {name: own.get(name, dtype) for name in launch.tensors}


def real_size(dtype: str) -> dict[str, tuple[tuple[Launch, ...], tuple[Scratch, ...]]]:
    """Every distinct kernel of both ops at ViT-L/14-336, and their scratch buffers.

    Six 24x24 crops, 3x3 bins, 1x, 2x and 4x.
    """
    levels = [window.LevelShape(24 * scale, 24 * scale, 3, 3) for scale in (1, 2, 4)]
    attention, scratch = window.plan(levels, batch=6, side=12, heads=32, size=128, channels=1024, dtype=dtype)
    distinct = {(launch.kernel, launch.constants): launch for launch in attention}
    return {
        "jbu": jbu.plan(6, 48, 48, 1024, dtype),
        "window_attention": (tuple(distinct.values()), scratch),
    }


def report(dtypes: Sequence[str] = DTYPES, targets: Sequence[int] = TARGETS) -> list[dict]:
    """Registers, shared memory and spills of every kernel at real size, a row a kernel and target."""
    rows, requests = [], []
    for dtype in dtypes:
        for op, (launches, scratch) in real_size(dtype).items():
            for launch in launches:
                for target in targets:
                    rows.append({"op": op, "kernel": launch.kernel, "dtype": dtype, "sm": target})
                    requests.append(Request.of(op, launch, types(launch, scratch, dtype), target))
    for row, kernel in zip(rows, compile_kernels(requests), strict=True):
        row |= {k: v for k, v in asdict(kernel).items() if k in COLUMNS} | {"ptx_bytes": len(kernel.ptx)}
    return rows


COLUMNS = ("shared", "warps", "registers", "spilled")
