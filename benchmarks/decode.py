"""Tokens a second of our language engine against eager transformers and the engines of others.

A LLaMA model with random weights; the same weights, prompt ids and greedy loop for all. Each engine runs in a
process of its own, so that peak memory is its own, and they take turns, so that a machine that slows down
slows all. They are loaded twice, in both orders: which memory the weights land in changes a decoding speed by
up to a quarter. Ratios are medians of the ratios of runs taken in the same turn.

    python benchmarks/decode.py [--weights float32,float16,int4] [--rounds 4] [--json FILE]
    python benchmarks/decode.py --wide                 4 layers of Vicuna-7B's width in int4

`--weights` may hold float32, float16 and int4: one GPTQ checkpoint in groups of 128, random integers, which
onnxruntime-genai reads too; OpenVINO (NNCF, groups of 128) and llama.cpp (Q4_0, groups of 32) round its
values anew. Heads: ours, OpenVINO's and llama.cpp's have 8 bits, onnxruntime-genai's 4. Engines that are not
installed are left out and named: `pip install onnxruntime-genai nncf openvino gguf llama-cpp-python`, in an
environment of their own; llama.cpp is compiled for this processor, which takes minutes. On a CPU ONNX Runtime
multiplies float16 weights in float32, to which it expands them when it loads them.
"""

import argparse
import importlib.metadata as metadata
import json
import multiprocessing as mp
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import decode_runners as runners
from rich.console import Console
from rich.progress import Progress

from uhd_export.runtime.memory import peak_memory
from uhd_export.runtime.profiling.machine import machine

OURS, TRANSFORMERS, GENAI, OPENVINO, LLAMA = runners.RUNNERS
ENGINES = {
    "float32": (OURS, TRANSFORMERS, GENAI),
    "float16": (OURS, TRANSFORMERS, GENAI),
    "int4": (OURS, GENAI, OPENVINO, LLAMA),
}
WIDE = {"weights": "int4", "hidden": 4096, "head_size": 128, "layers": 4, "rounds": 2, "steps": 32}
PACKAGES = (
    "torch",
    "transformers",
    "onnxruntime",
    "onnxruntime-genai",
    "openvino",
    "nncf",
    "llama-cpp-python",
)


def serve(kind: type, arguments: tuple, pipe: Connection) -> None:
    """Worker process: answers (ids, steps) with a run and the peak memory so far."""
    runner = kind(*arguments)
    pipe.send("ready")
    for ids, steps in iter(pipe.recv, None):
        pipe.send((runner.run(ids, steps), peak_memory()))


class Worker:
    """A runner in a process of its own."""

    def __init__(self, kind: type, *arguments: object) -> None:
        self.pipe, theirs = mp.Pipe()
        self.process = mp.get_context("spawn").Process(
            target=serve, args=(kind, arguments, theirs), daemon=True
        )
        self.process.start()
        theirs.close()  # so that a worker that dies ends recv
        self.pipe.recv()

    def run(self, ids: list[int], steps: int) -> tuple:
        """(run, peak memory in bytes)."""
        self.pipe.send((ids, steps))
        return self.pipe.recv()

    def close(self) -> None:
        """End the process."""
        self.pipe.send(None)
        self.process.join()


def apart(function: Callable, *arguments: object) -> object:
    """`function` in a fresh process: what it allocates is gone afterwards, its peak is its own."""
    with mp.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def measure(options: argparse.Namespace, folder: Path, progress: Progress) -> dict:
    """Everything: files, turns, summary."""
    size = {
        "hidden_size": options.hidden,
        "intermediate_size": options.intermediate or -(-options.hidden * 8 // 3 // 256) * 256,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.hidden // options.head_size,
        "num_key_value_heads": options.hidden // options.head_size,
        "vocab_size": options.vocab,
        "max_position_embeddings": 4096,
    }
    asked = [(name, weights) for weights in options.weights.split(",") for name in ENGINES[weights]]
    lacking = {name: module for name, _ in asked if (module := runners.missing(name))}
    kinds = [(name, weights) for name, weights in asked if name not in lacking]
    several = len(options.weights.split(","))
    task = progress.add_task("write", total=several + len(kinds) * (3 + 2 * (options.rounds + 1)))

    def note(text: str) -> None:
        progress.update(task, description=text, advance=1)

    for weights in options.weights.split(","):
        note(f"write the checkpoint, {weights}")
        apart(runners.write_model, folder, weights, size)
    weight_bytes = {}
    for name, weights in kinds:
        note(f"build {name} {weights}")
        exported = apart(runners.export, name, folder, weights, size)
        if exported is not None:
            weight_bytes[weights] = exported

    # A fixed prompt of ids spread over the vocabulary.
    ids = [3 + (7919 * i) % (options.vocab - 3) for i in range(options.prompt)]
    context = options.prompt + options.steps + 1
    shared = (options.threads, context)
    runs, peaks, rates, loads = {kind: [] for kind in kinds}, dict.fromkeys(kinds, 0), [], []
    for order in (kinds, kinds[::-1]):
        workers = {}
        for name, weights in order:
            note(f"load {name} {weights}")
            workers[name, weights] = Worker(runners.RUNNERS[name], folder, weights, *shared)
        memory = Worker(runners.Bandwidth, folder, "", *shared)
        for turn in range(options.rounds + 1):
            for kind in order[turn % len(order) :] + order[: turn % len(order)]:
                note(f"{' '.join(kind)}, turn {turn} of {options.rounds}")
                run, peak = workers[kind].run(ids, options.steps)
                peaks[kind] = max(peaks[kind], peak)
                if turn:  # the first warms up
                    runs[kind].append(run)
            rates.append(memory.run(ids, 0)[0])
            loads.append(os.getloadavg()[0])
        for worker in [*workers.values(), memory]:
            worker.close()
    rate = statistics.median(rates)
    return {
        "machine": where(options.threads) | {"load_average": statistics.median(loads)},
        "model": size,
        "prompt": options.prompt,
        "steps": options.steps,
        "runs": 2 * options.rounds,
        "read_bandwidth": rate,
        "weight_bytes": weight_bytes,
        "floor_tokens_per_second": {w: rate / size for w, size in weight_bytes.items()},
        "not_installed": lacking,
        "rows": [summarise(kind, runs, peaks) for kind in kinds],
    }


def summarise(kind: tuple[str, str], runs: dict, peaks: dict) -> dict:
    """Medians and spread of one engine, and its speed as a multiple of the others' with the same weights."""
    name, weights = kind
    prefill = [run.prefill for run in runs[kind]]
    decode = [len(run.steps) / sum(run.steps) for run in runs[kind]]
    reference = runs.get((TRANSFORMERS, "float32"), runs[OURS, weights])
    row = {
        "engine": name,
        "weights": weights,
        "prefill_seconds": statistics.median(prefill),
        "prefill_runs": prefill,
        "decode_tokens_per_second": statistics.median(decode),
        "decode_runs": decode,
        "step_p90_seconds": statistics.quantiles([s for r in runs[kind] for s in r.steps], n=10)[-1],
        "peak_bytes": peaks[kind],
        "first_tokens_equal": _equal(runs[kind][0].tokens, reference[0].tokens),
    }
    for other in (TRANSFORMERS, GENAI, OPENVINO, LLAMA):
        if name == OURS and (theirs := runs.get((other, weights))):
            pairs = list(zip(runs[kind], theirs, strict=True))
            row[f"prefill_vs_{other}"] = statistics.median(b.prefill / a.prefill for a, b in pairs)
            row[f"decode_vs_{other}"] = statistics.median(sum(b.steps) / sum(a.steps) for a, b in pairs)
    return row


def _equal(a: list[int], b: list[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def where(threads: int) -> dict:
    """What the numbers were measured on."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    installed = {d.name for d in metadata.distributions()}
    versions = {p: metadata.version(p) for p in PACKAGES if p in installed}
    return {**machine("cpu", threads), "memory_bytes": pages, **versions}


def show(result: dict) -> None:
    """Print a table in Markdown and what belongs to it."""
    model, count = result["model"], result["steps"] + 1
    print(
        f"\nLLaMA, {model['num_hidden_layers']} layers of {model['hidden_size']}: prompt {result['prompt']}, "
        f"then {result['steps']} tokens; {result['machine']['processor']}, "
        f"{result['machine']['threads']} threads\n"
    )
    print("| engine | weights | prefill s | tokens/s | of the floor | peak MB | same tokens |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for row in result["rows"]:
        rates, prefills = row["decode_runs"], row["prefill_runs"]
        floor = row["decode_tokens_per_second"] / result["floor_tokens_per_second"][row["weights"]]
        print(
            f"| {row['engine']} | {row['weights']} "
            f"| {row['prefill_seconds']:.2f} ({min(prefills):.2f}-{max(prefills):.2f}) "
            f"| {row['decode_tokens_per_second']:.1f} ({min(rates):.1f}-{max(rates):.1f}) | {floor:.0%} "
            f"| {row['peak_bytes'] / 1e6:.0f} | {row['first_tokens_equal']}/{count} |"
        )
    print()
    for row in result["rows"]:
        for other in (TRANSFORMERS, GENAI, OPENVINO, LLAMA):
            if f"decode_vs_{other}" in row:
                print(
                    f"{row['weights']}: {row[f'prefill_vs_{other}']:.2f}x the prefill and "
                    f"{row[f'decode_vs_{other}']:.2f}x the decoding speed of {other}"
                )
    for name, module in result["not_installed"].items():
        print(f"{name}: left out, {module} is not installed")
    load = result["machine"]["load_average"]
    if load > 1.5 * int(result["machine"]["threads"]):
        print(f"Load average {load:.1f}: other work shared the processor; trust ratios, not rates.")
    print(f"Memory is read at {result['read_bandwidth'] / 1e9:.1f} GB/s; the floor reads all weights:")
    for weights, size in result["weight_bytes"].items():
        rate = result["floor_tokens_per_second"][weights]
        print(f"  {weights}: {size / 1e6:.0f} MB, {rate:.1f} tokens/s")


def main() -> None:
    """Parse options, measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="float32,float16,int4")
    parser.add_argument("--hidden", type=int, default=1024, help="a multiple of 64")
    parser.add_argument("--intermediate", type=int, help="default: 8/3 of hidden, in steps of 256")
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--prompt", type=int, default=1066, help="positions of a 1008x672 image's prompt")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4, help="turns after each loading")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--wide", action="store_true", help="other defaults: Vicuna-7B's width, int4")
    if "--wide" in sys.argv:
        parser.set_defaults(**WIDE)
    options = parser.parse_args()
    if unknown := set(options.weights.split(",")) - runners.GENAI_PRECISION.keys():
        parser.error(f"--weights: {', '.join(unknown)} unknown; use {', '.join(runners.GENAI_PRECISION)}")
    with tempfile.TemporaryDirectory() as tmp, Progress(console=Console(stderr=True), transient=True) as bar:
        result = measure(options, Path(tmp), bar)
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
