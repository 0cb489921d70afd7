"""Ahead-of-time compilation of the kernels for GPUs that need not be there, with a report.

`python -m plugins.compile` compiles every kernel at real size for every target and prints registers,
shared memory and spills; `--json` for machines, `--dtype` and `--target` to choose. Results are kept
in the cache folder, keyed by the kernels' source, the compiler's version and the request.
"""

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from plugins.jbu import launch as jbu
from plugins.launch import Launch
from plugins.window_attention import launch as window
from runtime.errors import UhdError
from runtime.tensorrt_backend import cache_folder

TARGETS = (80, 86, 87, 89, 90, 120)  # A100; RTX 30; Jetson Orin; RTX 40; H100 and H200; RTX 50
DTYPES = ("float16", "bfloat16", "float32")
FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel: what a driver needs to launch it, and what it uses."""

    name: str
    capability: int
    ptx: str
    shared: int  # bytes of dynamic shared memory
    warps: int
    nulls: int  # pointers that the compiler appends to the arguments; unused, hence null
    registers: int  # a thread
    spilled: int  # bytes a thread


@dataclass(frozen=True)
class Request:
    """One kernel for one target. Everything that the result depends on, save the source."""

    module: str
    kernel: str
    types: tuple[str, ...]  # of the tensors, in argument order
    integers: int
    constants: tuple[tuple[str, int | bool | str], ...]
    warps: int
    stages: int
    registers: int | None
    capability: int

    @classmethod
    def of(cls, op: str, launch: Launch, types: Mapping[str, str], capability: int) -> "Request":
        """The request for a `launch` of `op` ("jbu", "window_attention"), given its tensors' types."""
        return cls(
            module=f"plugins.{op}.kernel",
            kernel=launch.kernel,
            types=tuple(types[name] for name in launch.tensors),
            integers=len(launch.integers),
            constants=launch.constants,
            warps=launch.warps,
            stages=launch.stages,
            registers=launch.registers,
            capability=capability,
        )

    def key(self) -> str:
        """Name of the result in the cache."""
        sources = [FOLDER / name for name in ("tiles.py", "compile_worker.py")]
        sources.append(FOLDER / self.module.split(".")[1] / "kernel.py")
        parts = [json.dumps(asdict(self), sort_keys=True), triton_version()]
        parts += [hashlib.sha256(source.read_bytes()).hexdigest() for source in sources]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def triton_version() -> str:
    """The installed compiler's version; UhdError where there is none."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        raise UhdError(
            "triton: not installed, and kernels are compiled with it; pip install triton==3.7.1"
        ) from None


def compile_kernels(requests: Sequence[Request]) -> list[Kernel]:
    """Compile what the cache does not hold, a worker process per core; results in order.

    Raises UhdError where Triton is missing or the compiler fails.
    """
    folder = cache_folder() / "kernels"
    paths = [folder / f"{request.key()}.json" for request in requests]
    missing = {path: request for path, request in zip(paths, requests, strict=True) if not path.is_file()}
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        workers = min(os.cpu_count() or 1, len(missing))
        items = list(missing.items())
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(_work, (items[i::workers] for i in range(workers))))
    return [Kernel(**json.loads(path.read_text(encoding="utf-8"))) for path in paths]


def _work(items: Sequence[tuple[Path, Request]]) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_DISABLE_LINE_INFO": "1",
        "PYTHONPATH": os.pathsep.join([str(FOLDER.parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    command = [sys.executable, "-m", "plugins.compile_worker"]
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=environment) as worker,
    ):
        for path, request in items:
            try:
                worker.stdin.write(json.dumps(asdict(request)) + "\n")
                worker.stdin.flush()
            except BrokenPipeError:
                pass  # it died: told below
            line = worker.stdout.readline()
            if not line:
                log.seek(0)
                last = (log.read().strip().splitlines() or ["no message"])[-1]
                raise UhdError(f"kernel {request.kernel} for sm_{request.capability}: not compiled: {last}")
            partial = path.with_suffix(f".{os.getpid()}.partial")
            partial.write_text(
                json.dumps(json.loads(line) | {"capability": request.capability}), encoding="utf-8"
            )
            partial.replace(path)
        worker.stdin.close()


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


@click.command()
@click.option(
    "--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES), help="Data type; all by default."
)
@click.option(
    "--target", "targets", multiple=True, type=int, help="Compute capability, as 89; all by default."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON list instead of a table.")
def main(dtypes: tuple[str, ...], targets: tuple[int, ...], as_json: bool) -> None:
    """Compile every kernel at real size and report what it uses."""
    try:
        rows = report(dtypes or DTYPES, targets or TARGETS)
    except UhdError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    if as_json:
        click.echo(json.dumps(rows))
        return
    for row in ([dict.fromkeys(rows[0])], rows):
        for line in row:
            click.echo(
                "  ".join(f"{line[k] if line[k] is not None else k!s:>{WIDTHS.get(k, 8)}}" for k in line)
            )


WIDTHS = {"op": 16, "kernel": 15, "pixels": 6, "sm": 4, "registers": 9, "ptx_bytes": 9}

if __name__ == "__main__":
    main()
