"""The exported vision path against the released computation, side by side at real size.

ViT-L/14-336, D = 4096, random weights, float32, on this machine's CPU: `folded` is our vision.onnx
in ONNX Runtime, `eager` the released computation in eager PyTorch. For each workload both run in processes of
their own (so that peak memory is their own), and they take turns, so a machine that slows down slows both.
Before the turns that count, both run one crop. By default three turns count of the crop, two of the image,
which takes eager minutes.

    python benchmarks/vision.py [--masks 7,5] [--repeats 3] [--crop-only] [--json FILE]
"""

import argparse
import json
import multiprocessing as mp
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from random_checkpoint import write_checkpoint
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from uhd_export.runtime.memory import peak_memory
from uhd_export.runtime.profiling.machine import machine
from uhd_export.runtime.profiling.stages import VISION_STAGES as STAGES
from uhd_export.runtime.profiling.stages import stage_shares

Batches = list[tuple[int, int, int]]


class Workload(NamedTuple):
    """(crops, rows, columns) of each batch of equal crops, and how often it is run."""

    batches: Batches
    repeats: int


CROP = [(1, 24, 24)]
WORKLOADS = {
    "336x336 crop": Workload(CROP, 3),
    "1008x672 image": Workload([(6, 24, 24), (1, 19, 29)], 2),
}


class Run(NamedTuple):
    """One run of a workload: seconds, seconds by stage where they were taken, tokens."""

    seconds: float
    stages: dict[str, float]
    tokens: list[np.ndarray]


def pixels_for(batch: int, rows: int, cols: int) -> np.ndarray:
    """Random normalised pixels of equal crops."""
    return np.random.default_rng(rows).standard_normal((batch, 3, rows * 14, cols * 14), np.float32)


class Eager:
    """The released computation in eager PyTorch, timed between stages."""

    def __init__(self, folder: Path, threads: int) -> None:
        import torch

        from uhd_export.checkpoint.config import read_config
        from uhd_export.checkpoint.reader import PROJECTOR_PREFIX, VISION_PREFIX, Checkpoint
        from uhd_export.model.projector import HiwinProjector
        from uhd_export.model.vit import VisionTower

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        config = read_config(folder).projector
        self.levels = sorted({*config.levels, *config.stages})
        with torch.device("meta"):
            self.tower, self.projector = VisionTower(read_config(folder).vision), HiwinProjector(config)
        checkpoint = Checkpoint(folder)
        checkpoint.load_into(self.tower, VISION_PREFIX, torch.float32)
        checkpoint.load_into(self.projector, PROJECTOR_PREFIX, torch.float32)
        checkpoint.close()

    def run(self, batches: Batches) -> Run:
        """Encode every batch of crops."""
        import torch

        from uhd_export.runtime.image.geometry import crop_geometry

        stages, tokens = dict.fromkeys(STAGES, 0.0), []
        for batch, rows, cols in batches:
            pixels = torch.from_numpy(pixels_for(batch, rows, cols))
            arrays = crop_geometry(rows, cols, levels=self.levels)
            geometry = {name: torch.from_numpy(array) for name, array in arrays.items()}
            times = [time.perf_counter()]
            features = self.tower(pixels, geometry)
            times.append(time.perf_counter())
            maps = self.projector.pyramid(features, pixels, geometry)
            times.append(time.perf_counter())
            tokens.append(self.projector.attend(maps, geometry).numpy())
            times.append(time.perf_counter())
            for stage, spent in zip(STAGES, np.diff(times), strict=True):
                stages[stage] += float(spent)
        return Run(sum(stages.values()), stages, tokens)


class Folded:
    """vision.onnx in ONNX Runtime, traced: that costs microseconds a node, where a run takes seconds."""

    def __init__(self, folder: Path, threads: int) -> None:
        from uhd_export.runtime.engines.backends import open_engine

        self.traces = tempfile.TemporaryDirectory()
        path, prefix = folder / "vision.onnx", Path(self.traces.name) / "vision"
        self.engine = open_engine(path, threads=threads, profile=prefix)

    def run(self, batches: Batches) -> Run:
        """Encode every batch of crops."""
        from uhd_export.runtime.image.geometry import crop_geometry

        seconds, tokens = 0.0, []
        for batch, rows, cols in batches:
            geometry = {k: v for k, v in crop_geometry(rows, cols).items() if k in self.engine.inputs}
            feeds = {"pixels": pixels_for(batch, rows, cols), **geometry}
            start = time.perf_counter()
            tokens.append(self.engine.infer(feeds)["tokens"])
            seconds += time.perf_counter() - start
        return Run(seconds, {}, tokens)

    def shares(self, runs: int) -> dict[str, float]:
        """Share of each stage in the last `runs` runs of the graph; ends the trace."""
        events = json.loads(self.engine.end_profile().read_text(encoding="utf-8"))
        self.traces.cleanup()
        return stage_shares(events, runs)


def serve(kind: type, folder: Path, threads: int, pipe: mp.connection.Connection) -> None:
    """Worker process: answers (method, argument) with its result and the peak memory so far."""
    runner = kind(folder, threads)
    pipe.send("ready")
    for method, argument in iter(pipe.recv, None):
        result = getattr(runner, method)(argument)
        pipe.send((result, peak_memory()))


class Worker:
    """A runner in a process of its own."""

    def __init__(self, kind: type, folder: Path, threads: int) -> None:
        self.pipe, theirs = mp.Pipe()
        self.process = mp.get_context("spawn").Process(
            target=serve, args=(kind, folder, threads, theirs), daemon=True
        )
        self.process.start()
        theirs.close()  # so that a worker that dies ends recv
        self.pipe.recv()

    def call(self, method: str, argument: object) -> tuple:
        """(result, peak memory in bytes)."""
        self.pipe.send((method, argument))
        return self.pipe.recv()

    def close(self) -> None:
        """End the process."""
        self.pipe.send(None)
        self.process.join()


def export(folder: Path) -> None:
    """Emit vision.onnx beside the checkpoint."""
    from uhd_export.checkpoint.config import read_config
    from uhd_export.checkpoint.reader import Checkpoint
    from uhd_export.graph.vision import emit_vision

    emit_vision(read_config(folder), Checkpoint(folder), folder / "vision.onnx")


def measure(
    mask: int, threads: int, workloads: dict[str, Workload], progress: Progress, folder: Path
) -> list[dict]:
    """Rows of results for one mask, whose files go into `folder`: each workload's times and memory."""
    turns = sum(workload.repeats for workload in workloads.values())
    task = progress.add_task(f"mask {mask}: export", total=1 + 2 * (len(workloads) + turns))
    write_checkpoint(folder, mask=mask)
    exporter = mp.get_context("spawn").Process(target=export, args=(folder,))
    exporter.start()
    exporter.join()
    progress.advance(task)
    rows = []
    for name, workload in workloads.items():
        progress.update(task, description=f"mask {mask}: {name}")
        row = compare(workload, folder, threads, lambda: progress.advance(task))
        rows.append({"mask": mask, "workload": name, **row})
    return rows


def compare(workload: Workload, folder: Path, threads: int, on_run: Callable[[], None]) -> dict:
    """Both sides on one workload, in turns."""
    workers = {side: Worker(kind, folder, threads) for side, kind in (("eager", Eager), ("folded", Folded))}
    runs, peaks = {side: [] for side in workers}, {}
    for worker in workers.values():
        worker.call("run", CROP)
        on_run()
    for _ in range(workload.repeats):
        for side, worker in workers.items():
            result, peaks[side] = worker.call("run", workload.batches)
            runs[side].append(result)
            on_run()
    shares, _ = workers["folded"].call("shares", workload.repeats * len(workload.batches))
    for worker in workers.values():
        worker.close()
    return summarise(runs, peaks, shares)


def summarise(runs: dict[str, list[Run]], peaks: dict[str, int], shares: dict[str, float]) -> dict:
    """Medians and spread, ratio of runs taken in turn, and the difference of the tokens."""
    out: dict = {"runs_a_side": len(runs["eager"])}
    for name, several in runs.items():
        seconds = [run.seconds for run in several]
        stages = {s: statistics.median(run.stages[s] for run in several) for s in several[0].stages}
        out[name] = {
            "seconds": statistics.median(seconds),
            "runs": seconds,
            "stages": stages,
            "peak": peaks[name],
        }
    out["folded"]["stages"] = {stage: share * out["folded"]["seconds"] for stage, share in shares.items()}
    projector = {side: out[side]["stages"]["jbu"] + out[side]["stages"]["hiwin"] for side in runs}
    out["projector_ratio"] = projector["eager"] / projector["folded"]
    out["hiwin_ratio"] = out["eager"]["stages"]["hiwin"] / out["folded"]["stages"]["hiwin"]
    pairs = zip(runs["eager"], runs["folded"], strict=True)
    out["vision_ratio"] = statistics.median(a.seconds / b.seconds for a, b in pairs)
    a, b = (np.concatenate([t.reshape(-1) for t in runs[side][0].tokens]) for side in ("folded", "eager"))
    out["relative_error"] = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    return out


def show(rows: list[dict], console: Console) -> None:
    """Print the table."""
    table = Table(
        title="Vision path at real size: released computation in eager PyTorch / folded ONNX, seconds"
    )
    for column in (
        "mask",
        "workload",
        "runs",
        "ViT",
        "JBU",
        "Hiwin",
        "all",
        "projector ratio",
        "vision ratio",
        "peak GB",
        "error",
    ):
        table.add_column(column, justify="left" if column == "workload" else "right")
    for row in rows:
        eager, folded = row["eager"], row["folded"]
        pairs = [f"{eager['stages'][s]:.2f} / {folded['stages'][s]:.2f}" for s in STAGES]
        table.add_row(
            str(row["mask"]),
            row["workload"],
            str(row["runs_a_side"]),
            *pairs,
            f"{eager['seconds']:.2f} / {folded['seconds']:.2f}",
            f"{row['projector_ratio']:.1f}x",
            f"{row['vision_ratio']:.2f}x",
            f"{eager['peak'] / 1e9:.1f} / {folded['peak'] / 1e9:.1f}",
            f"{row['relative_error']:.0e}",
        )
    console.print(table)
    console.print("Projector is JBU and Hiwin. Folded stages: shares of a trace of the same runs.")


def main() -> None:
    """Parse options, measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--masks", default="7,5")
    parser.add_argument("--repeats", type=int, help="default: 3 for the crop, 2 for the image")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--crop-only", action="store_true", help="leave out the whole image")
    options = parser.parse_args()
    workloads = dict(list(WORKLOADS.items())[:1]) if options.crop_only else WORKLOADS
    if options.repeats is not None:
        workloads = {name: w._replace(repeats=options.repeats) for name, w in workloads.items()}
    console = Console(width=150)
    rows: list[dict] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for mask in options.masks.split(","):
            with tempfile.TemporaryDirectory() as folder:
                rows += measure(int(mask), options.threads, workloads, progress, Path(folder))
    show(rows, console)
    if options.json:
        where = machine("cpu", options.threads)
        facts = {"machine": where, "note": " ".join(__doc__.split("\n\n")[1].split()), "rows": rows}
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
