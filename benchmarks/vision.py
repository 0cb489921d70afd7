"""The exported vision path against the released computation, and against OpenVINO, side by side at real size.

ViT-L/14-336, D = 4096, random weights, on this machine's CPU. Sides: `eager` is the released computation in
eager PyTorch, float32; `folded` is our vision.onnx in ONNX Runtime, float32; `int8` the same as
`--vision-weights int8` writes it; `openvino-bf16` and `openvino-int8` are OpenVINO on our graph with its
functions inline, in its default types and quantized by NNCF on two crops. For each workload all run in
processes of their own (so that peak memory is their own), and they take turns, so a machine that slows down
slows all. Before the turns that count, each runs one crop. By default three turns count of the crop, two of
the image, which takes eager minutes. The error is the tokens' against the first side's.

    python benchmarks/vision.py [--masks 7,5] [--repeats 3] [--crop-only] [--json FILE]
    python benchmarks/vision.py --masks 7 --sides folded,int8,openvino-bf16,openvino-int8

OpenVINO is optional: `pip install openvino nncf`.
"""

import argparse
import json
import multiprocessing as mp
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from random_checkpoint import write_checkpoint
from rich.console import Console
from rich.progress import Progress
from vision_sides import CROP, SIDES, Batches, Folded, Run, export

from uhd_export.runtime.memory import peak_memory
from uhd_export.runtime.profiling.machine import machine
from uhd_export.runtime.profiling.stages import VISION_STAGES as STAGES

# Operators that are named.
_MOST = 8


class Workload(NamedTuple):
    """(crops, rows, columns) of each batch of equal crops, and how often it is run."""

    batches: Batches
    repeats: int


WORKLOADS = {
    "336x336 crop": Workload(CROP, 3),
    "1008x672 image": Workload([(6, 24, 24), (1, 19, 29)], 2),
}


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


def measure(
    mask: int,
    threads: int,
    workloads: dict[str, Workload],
    sides: Sequence[str],
    progress: Progress,
    folder: Path,
) -> list[dict]:
    """Rows of results for one mask, whose files go into `folder`: each workload's times and memory."""
    turns = sum(workload.repeats + 1 for workload in workloads.values())
    task = progress.add_task(f"mask {mask}: export", total=1 + len(sides) * turns)
    write_checkpoint(folder, mask=mask)
    exporter = mp.get_context("spawn").Process(target=export, args=(folder, sides))
    exporter.start()
    exporter.join()
    if exporter.exitcode:
        raise SystemExit("the export failed; see above")
    progress.advance(task)
    rows = []
    for name, workload in workloads.items():
        progress.update(task, description=f"mask {mask}: {name}")
        row = compare(workload, folder, threads, sides, lambda: progress.advance(task))
        rows.append({"mask": mask, "workload": name, **row})
    return rows


def compare(
    workload: Workload, folder: Path, threads: int, sides: Sequence[str], on_run: Callable[[], None]
) -> dict:
    """All sides on one workload, in turns."""
    workers = {side: Worker(SIDES[side], folder, threads) for side in sides}
    runs, peaks = {side: [] for side in workers}, {}
    for worker in workers.values():
        worker.call("run", CROP)
        on_run()
    for _ in range(workload.repeats):
        for side, worker in workers.items():
            result, peaks[side] = worker.call("run", workload.batches)
            runs[side].append(result)
            on_run()
    shares = {
        side: workers[side].call("shares", workload.repeats * len(workload.batches))[0]
        for side in workers
        if issubclass(SIDES[side], Folded)
    }
    for worker in workers.values():
        worker.close()
    return summarise(runs, peaks, shares)


def summarise(
    runs: dict[str, list[Run]],
    peaks: dict[str, int],
    shares: dict[str, tuple[dict[str, float], dict[str, float]]],
) -> dict:
    """Medians and spread by side, ratios of runs taken in turn and the tokens' error, both to the first's."""
    first = next(iter(runs))
    exact = np.concatenate([tokens.reshape(-1) for tokens in runs[first][0].tokens])
    sides = {}
    for side, several in runs.items():
        seconds = [run.seconds for run in several]
        median = statistics.median(seconds)
        stages = {s: statistics.median(run.stages[s] for run in several) for s in several[0].stages}
        by_stage, by_operator = shares.get(side, ({}, {}))
        stages |= {stage: share * median for stage, share in by_stage.items()}
        tokens = np.concatenate([tokens.reshape(-1) for tokens in several[0].tokens])
        sides[side] = {
            "seconds": median,
            "runs": seconds,
            "stages": stages,
            "operators": by_operator,
            "peak": peaks[side],
            "ratio": statistics.median(
                a.seconds / b.seconds for a, b in zip(runs[first], several, strict=True)
            ),
            "relative_error": float(np.linalg.norm(tokens - exact) / np.linalg.norm(exact)),
        }
    return {"runs_a_side": len(runs[first]), "sides": sides}


def show(rows: list[dict]) -> None:
    """Print a table in Markdown."""
    columns = ("ViT s", "JBU s", "Hiwin s", "all s", "times the first", "peak GB", "error")
    print(f"\n| mask | workload | side | {' | '.join(columns)} |\n|---|---|---|{'---:|' * len(columns)}")
    for row in rows:
        for name, side in row["sides"].items():
            stages = [f"{side['stages'][s]:.2f}" if s in side["stages"] else "-" for s in STAGES]
            print(
                f"| {row['mask']} | {row['workload']} | {name} | {' | '.join(stages)} "
                f"| {side['seconds']:.2f} ({min(side['runs']):.2f}-{max(side['runs']):.2f}) "
                f"| {side['ratio']:.2f} | {side['peak'] / 1e9:.1f} | {side['relative_error']:.0e} |"
            )
    print("\nStages of our graph are shares of a trace of the same runs. Its operators:\n")
    for row in rows:
        for name, side in row["sides"].items():
            if most := [f"{operator} {share:.0%}" for operator, share in side["operators"].items()][:_MOST]:
                print(f"- {row['workload']}, {name}: {', '.join(most)}")


def main() -> None:
    """Parse options, measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--masks", default="7,5")
    parser.add_argument("--sides", default="eager,folded", help=f"of {', '.join(SIDES)}")
    parser.add_argument("--repeats", type=int, help="default: 3 for the crop, 2 for the image")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--crop-only", action="store_true", help="leave out the whole image")
    options = parser.parse_args()
    workloads = dict(list(WORKLOADS.items())[:1]) if options.crop_only else WORKLOADS
    if options.repeats is not None:
        workloads = {name: w._replace(repeats=options.repeats) for name, w in workloads.items()}
    sides = options.sides.split(",")
    if unknown := set(sides) - SIDES.keys():
        parser.error(f"--sides: {', '.join(unknown)} unknown; use {', '.join(SIDES)}")
    rows: list[dict] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for mask in options.masks.split(","):
            with tempfile.TemporaryDirectory() as folder:
                rows += measure(int(mask), options.threads, workloads, sides, progress, Path(folder))
    show(rows)
    if options.json:
        where = machine("cpu", options.threads)
        facts = {"machine": where, "note": " ".join(__doc__.split("\n\n")[1].split()), "rows": rows}
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
