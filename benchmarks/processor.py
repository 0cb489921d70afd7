"""What large pages, and denormal numbers as zero, are worth on this processor: each taken away, in turns.

4 layers of Vicuna-7B's width in int4 with random weights, a prompt of 1066 positions, then 32 tokens. Every
turn loads each side in a process of its own, since where the weights come to lie decides how fast they are
read. Ratios are medians of turns. Random weights have more denormal numbers than trained ones: their scores
lie further apart.

    python benchmarks/processor.py [--turns 3] [--json FILE]
"""

import argparse
import json
import os
import statistics
import tempfile
from contextlib import nullcontext
from pathlib import Path

import decode_runners as runners
from decode import WIDE, Worker, apart
from rich.console import Console
from rich.progress import Progress

from uhd_export.runtime.engines import onnxruntime as engine
from uhd_export.runtime.profiling.machine import machine

VOCABULARY, PROMPT, STEPS = 32000, 1066, 32


class WithoutPages(runners.Ours):
    """Weights on pages of 4 KB."""

    def __init__(self, *arguments: object) -> None:
        engine.large_pages = nullcontext
        super().__init__(*arguments)


class WithDenormals(runners.Ours):
    """Denormal numbers computed with."""

    def __init__(self, *arguments: object) -> None:
        engine.SETS_DENORMALS, engine.denormals_as_zero = False, nullcontext
        super().__init__(*arguments)


SIDES = {"as it is": runners.Ours, "pages of 4 KB": WithoutPages, "denormals": WithDenormals}


def measure(turns: int, threads: int, folder: Path, progress: Progress) -> dict[str, list[dict[str, float]]]:
    """Seconds of the prompt, and of a step at the median, of each side and turn."""
    task = progress.add_task("write", total=1 + turns * len(SIDES))
    size = {
        "hidden_size": WIDE["hidden"],
        "intermediate_size": 11008,
        "num_hidden_layers": WIDE["layers"],
        "num_attention_heads": WIDE["hidden"] // WIDE["head_size"],
        "num_key_value_heads": WIDE["hidden"] // WIDE["head_size"],
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
    }
    apart(runners.write_model, folder, "int4", size)
    apart(runners.export, "uhd-export", folder, "int4", size)
    progress.advance(task)
    ids = [3 + (7919 * i) % (VOCABULARY - 3) for i in range(PROMPT)]
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for turn in range(turns):
        order = list(SIDES)[:: 1 if turn % 2 == 0 else -1]
        for side in order:
            progress.update(task, description=f"{side}, turn {turn + 1} of {turns}", advance=1)
            worker = Worker(SIDES[side], folder, "int4", threads, PROMPT + STEPS + 1)
            worker.run(ids, STEPS)  # warms up
            run, _ = worker.run(ids, STEPS)
            worker.close()
            found[side].append({"prefill": run.prefill, "step": statistics.median(run.steps)})
    return found


def show(found: dict[str, list[dict[str, float]]]) -> None:
    """Rows of Markdown: medians, spread, and how much faster things are as they are."""
    print("\n| | prompt, s | a step, ms | without: prompt, step |\n|---|---:|---:|---:|")
    usual = found["as it is"]
    for side, turns in found.items():
        cells, ratios = [], []
        for part, unit, digits in (("prefill", 1, 2), ("step", 1e3, 1)):
            values = [unit * turn[part] for turn in turns]
            cells.append(
                f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"
            )
            ratios.append(statistics.median(a[part] / b[part] for a, b in zip(turns, usual, strict=True)))
        print(f"| {side} | {' | '.join(cells)} | {', '.join(f'{ratio:.2f}x' for ratio in ratios)} |")


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp, Progress(console=Console(stderr=True), transient=True) as bar:
        found = measure(options.turns, options.threads, Path(tmp), bar)
    show(found)
    if options.json:
        facts = {"machine": machine("cpu", options.threads), "sides": found}
        options.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
