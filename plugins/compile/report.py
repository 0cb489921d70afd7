"""What every kernel at real size uses on every target: registers, shared memory, spills.

`python -m uhd_export.plugins.compile` prints it; `--json` for machines, `--dtype` and `--target` to choose.
"""

from collections.abc import Sequence
from dataclasses import asdict

from uhd_export.plugins.compile.compiler import DTYPES, TARGETS, Request, compile_kernels
from uhd_export.plugins.jbu import launch as jbu
from uhd_export.plugins.launch import Launch
from uhd_export.plugins.window_attention import launch as window


def types(names: Sequence[str], dtype: str) -> dict[str, str]:
    """Types of the named tensors as the exported graph has them: all `dtype`, scratch float32."""
    return {name: "float32" if name in SCRATCH else dtype for name in names}


SCRATCH = ("scores", "features")  # `features` of JBU; a level's features are `features_0` to `_3`


def real_size(dtype: str) -> dict[str, tuple[Launch, ...]]:
    """Every distinct kernel of both ops at ViT-L/14-336: six 24x24 crops, 3x3 bins, 1x, 2x and 4x."""
    levels = [window.LevelShape(24 * scale, 24 * scale, 3, 3) for scale in (1, 2, 4)]
    attention, _ = window.plan(levels, batch=6, side=12, queries=128, sets=4, channels=1024, dtype=dtype)
    distinct = {(launch.kernel, launch.constants): launch for launch in attention}
    return {"jbu": jbu.plan(6, 48, 48, 1024, dtype)[0], "window_attention": tuple(distinct.values())}


def report(dtypes: Sequence[str] = DTYPES, targets: Sequence[int] = TARGETS) -> list[dict]:
    """Registers, shared memory and spills of every kernel at real size, a row a kernel and target."""
    rows, requests = [], []
    for dtype in dtypes:
        for op, launches in real_size(dtype).items():
            for launch in launches:
                for target in targets:
                    pixels = dict(launch.constants).get("PIXELS", "")
                    rows.append(
                        {"op": op, "kernel": launch.kernel, "pixels": pixels, "dtype": dtype, "sm": target}
                    )
                    requests.append(Request.of(op, launch, types(launch.tensors, dtype), target))
    for row, kernel in zip(rows, compile_kernels(requests), strict=True):
        row |= {k: v for k, v in asdict(kernel).items() if k in COLUMNS} | {"ptx_bytes": len(kernel.ptx)}
    return rows


COLUMNS = ("shared", "warps", "registers", "spilled")
