"""The exported vision path against the released computation, side by side at real size.

ViT-L/14-336, D = 4096, random weights, float32, on this machine's CPU: `folded` is our vision.onnx
in ONNX Runtime, `eager` the released computation in eager PyTorch. Each runs in a process of its own
(so that peak memory is its own) and the two take turns, so a machine that slows down slows both.

    python benchmarks/vision.py [--masks 7,5] [--repeats 3] [--crop-only] [--json FILE]
"""

import argparse
import json
import multiprocessing as mp
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from random_checkpoint import write_checkpoint
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from runtime.machine import machine

# (crops, rows, columns) of each batch of equal crops.
WORKLOADS = {"336x336 crop": [(1, 24, 24)], "1008x672 image": [(6, 24, 24), (1, 19, 29)]}
STAGES = ("vit", "jbu", "hiwin")


class Run(NamedTuple):
    """One run of a workload: seconds, seconds by stage, tokens."""

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

        from uhd_export.checkpoint import PROJECTOR_PREFIX, VISION_PREFIX, Checkpoint, read_config
        from uhd_export.projector import HiwinProjector
        from uhd_export.vit import VisionTower

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

    def run(self, groups: list[tuple[int, int, int]]) -> Run:
        """Encode every batch of crops."""
        import torch

        from runtime.geometry import crop_geometry

        stages, tokens = dict.fromkeys(STAGES, 0.0), []
        for batch, rows, cols in groups:
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
    """vision.onnx in ONNX Runtime; stages from its own trace, scaled to the run's seconds."""

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = ort.InferenceSession(folder / "vision.onnx", options)
        self.folder, self.options = folder, options

    def run(self, groups: list[tuple[int, int, int]]) -> Run:
        """Encode every batch of crops."""
        from runtime.geometry import crop_geometry

        names = {i.name for i in self.session.get_inputs()}
        seconds, tokens = 0.0, []
        for batch, rows, cols in groups:
            geometry = {k: v for k, v in crop_geometry(rows, cols).items() if k in names}
            feeds = {"pixels": pixels_for(batch, rows, cols), **geometry}
            start = time.perf_counter()
            tokens.append(self.session.run(["tokens"], feeds)[0])
            seconds += time.perf_counter() - start
        return Run(seconds, {}, tokens)

    def trace(self, groups: list[tuple[int, int, int]]) -> dict[str, float]:
        """Share of each stage in a traced run of its own session."""
        import onnxruntime as ort

        with tempfile.TemporaryDirectory() as tmp:
            self.options.enable_profiling = True
            self.options.profile_file_prefix = str(Path(tmp) / "trace")
            self.session = ort.InferenceSession(self.folder / "vision.onnx", self.options)
            self.run(groups)
            events = json.loads(Path(self.session.end_profiling()).read_text())
        totals, stage = dict.fromkeys(STAGES, 0.0), "vit"
        for event in sorted(events, key=lambda e: e.get("ts", 0)):
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                # Nodes that the optimizer made have no stage in their name: they go with the last one.
                stage = _stage(event["name"]) or stage
                totals[stage] += event["dur"]
        whole = sum(totals.values())
        return {stage: spent / whole for stage, spent in totals.items()}


def _stage(node: str) -> str | None:
    if "JBU" in node:
        return "jbu"
    if "WindowAttention" in node:
        return "hiwin"
    return node.split("/")[0] if node.split("/")[0] in STAGES else None


def serve(kind: type, folder: Path, threads: int, pipe: mp.connection.Connection) -> None:
    """Worker process: answers (method, workload) with its result and the peak memory so far."""
    runner = kind(folder, threads)
    pipe.send("ready")
    for method, groups in iter(pipe.recv, None):
        result = getattr(runner, method)(groups)
        pipe.send((result, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


class Worker:
    """A runner in a process of its own."""

    def __init__(self, kind: type, folder: Path, threads: int) -> None:
        self.pipe, theirs = mp.Pipe()
        self.process = mp.get_context("spawn").Process(target=serve, args=(kind, folder, threads, theirs))
        self.process.start()
        self.pipe.recv()

    def call(self, method: str, groups: list) -> tuple:
        """(result, peak memory in bytes)."""
        self.pipe.send((method, groups))
        return self.pipe.recv()

    def close(self) -> None:
        """End the process."""
        self.pipe.send(None)
        self.process.join()


def export(folder: Path) -> None:
    """Emit vision.onnx beside the checkpoint."""
    from uhd_export.checkpoint import Checkpoint, read_config
    from uhd_export.vision_graph import emit_vision

    emit_vision(read_config(folder), Checkpoint(folder), folder / "vision.onnx")


def measure(mask: int, repeats: int, threads: int, workloads: dict, progress: Progress) -> list[dict]:
    """Rows of results for one mask: each workload's seconds, ratios and peak memory."""
    task = progress.add_task(f"mask {mask}: export", total=2 + len(workloads) * (2 * repeats + 1))
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        folder = write_checkpoint(Path(tmp) / "checkpoint", mask=mask)
        exporter = mp.get_context("spawn").Process(target=export, args=(folder,))
        exporter.start()
        exporter.join()
        progress.advance(task, 2)
        workers = {
            name: Worker(kind, folder, threads) for name, kind in (("eager", Eager), ("folded", Folded))
        }
        for workload, groups in workloads.items():
            runs, peaks = {name: [] for name in workers}, {}
            for repeat in range(repeats):
                for name, worker in workers.items():
                    progress.update(
                        task, description=f"mask {mask}: {workload}, {name} {repeat + 1}/{repeats}"
                    )
                    result, peaks[name] = worker.call("run", groups)
                    runs[name].append(result)
                    progress.advance(task)
            rows.append({"mask": mask, "workload": workload, **summarise(runs, peaks)})
        for row, groups in zip(rows, workloads.values(), strict=True):
            shares, _ = workers["folded"].call("trace", groups)
            row["folded"]["stages"] = {
                stage: share * row["folded"]["seconds"] for stage, share in shares.items()
            }
            eager, folded = (
                sum(row[side]["stages"][s] for s in ("jbu", "hiwin")) for side in ("eager", "folded")
            )
            row["projector_ratio"] = eager / folded
            row["hiwin_ratio"] = row["eager"]["stages"]["hiwin"] / row["folded"]["stages"]["hiwin"]
            progress.advance(task)
        for worker in workers.values():
            worker.close()
    return rows


def summarise(runs: dict[str, list[Run]], peaks: dict[str, int]) -> dict:
    """Medians and spread, ratio of runs taken in turn, and the difference of the tokens."""
    out: dict = {}
    for name, several in runs.items():
        seconds = [run.seconds for run in several]
        stages = {s: statistics.median(run.stages[s] for run in several) for s in several[0].stages}
        out[name] = {
            "seconds": statistics.median(seconds),
            "runs": seconds,
            "stages": stages,
            "peak": peaks[name],
        }
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
            *pairs,
            f"{eager['seconds']:.2f} / {folded['seconds']:.2f}",
            f"{row['projector_ratio']:.1f}x",
            f"{row['vision_ratio']:.2f}x",
            f"{eager['peak'] / 1e9:.1f} / {folded['peak'] / 1e9:.1f}",
            f"{row['relative_error']:.0e}",
        )
    console.print(table)
    console.print(
        "Projector is JBU and Hiwin. Folded stages: shares of a traced run times the untraced seconds."
    )


def main() -> None:
    """Parse options, measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--masks", default="7,5")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--crop-only", action="store_true", help="leave out the whole image")
    options = parser.parse_args()
    workloads = dict(list(WORKLOADS.items())[:1]) if options.crop_only else WORKLOADS
    console = Console(width=150)
    rows: list[dict] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for mask in options.masks.split(","):
            rows += measure(int(mask), options.repeats, options.threads, workloads, progress)
    show(rows, console)
    if options.json:
        where = machine("cpu", options.threads)
        options.json.write_text(json.dumps({"machine": where, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
