"""Time and memory of GPTQ on one decoder layer of Vicuna-7B's size.

A one-layer cut with random weights and correlated hidden states, quantized by the same code as a whole model,
in a process of its own so that peak memory is its own. What 32 layers would take is computed from it, and
labelled so: they have the same shape and are in memory one at a time.

    python benchmarks/quantize.py [--tokens 8192] [--held-out 1024] [--json FILE]
"""

import argparse
import json
import multiprocessing as mp
import tempfile
import time
from pathlib import Path

import torch

from uhd_export.runtime.profiling.machine import machine

LAYERS = 32
SEQUENCE = 1024


def hidden_states(rows: int, columns: int, seed: int) -> torch.Tensor:
    """(rows, columns) float32 in which directions are shared, as in real hidden states."""
    rank = columns // 4
    mix = torch.randn(rank, columns, generator=torch.Generator().manual_seed(0)) / rank**0.5
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, columns, generator=generator)
    return (torch.randn(rows, rank, generator=generator) @ mix).add_(noise, alpha=0.3)


def write_cut(folder: str) -> None:
    """One layer of Vicuna-7B's width with its embeddings and head, bfloat16."""
    from random_checkpoint import write_checkpoint

    write_checkpoint(Path(folder), language_layers=1)


def measure(folder: str, tokens: int, held_out: int, pipe: mp.connection.Connection) -> None:
    """Quantize the cut; send what it took."""
    from uhd_export.calibration.activations import Activations
    from uhd_export.calibration.gptq import Run
    from uhd_export.calibration.options import GptqOptions
    from uhd_export.calibration.sequences import Sequences
    from uhd_export.calibration.solver import library_version
    from uhd_export.calibration.work import Work
    from uhd_export.checkpoint.config import read_config
    from uhd_export.checkpoint.reader import Checkpoint
    from uhd_export.runtime.memory import peak_memory

    config = read_config(Path(folder)).language
    checkpoint = Checkpoint(Path(folder))
    calibration, held = (
        Activations(hidden_states(count, config.hidden, seed), (SEQUENCE,) * (count // SEQUENCE))
        for seed, count in ((1, tokens), (2, held_out))
    )
    judged = (16,) * len(held.lengths)
    work = Work(Path(folder) / "work")
    work.prepare({}, print)
    states = Run.states_of(Sequences(calibration, held, judged))
    run = Run(checkpoint, config, GptqOptions(group=128), work, states, judged)
    started, seconds = time.perf_counter(), []
    run.quantize_layers(lambda done, total: seconds.append(time.perf_counter() - started))
    total = time.perf_counter() - started
    layer_memory = peak_memory()
    records = run.records()
    pipe.send(
        {
            "gptqmodel": library_version(),
            "torch": torch.__version__,
            "seconds": total,
            "seconds_after_each_group": seconds,
            "peak_bytes": layer_memory,
            "mean_rtn_error": sum(r.rtn_error for r in records) / len(records),
            "mean_gptq_error": sum(r.gptq_error for r in records) / len(records),
        }
    )


def main() -> None:
    """Run both processes and print the result, the last line as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192, help="calibration tokens, a multiple of 1024")
    parser.add_argument("--held-out", type=int, default=1024, help="tokens to judge by, a multiple of 1024")
    parser.add_argument("--json", type=Path, help="write the result there too")
    options = parser.parse_args()
    if options.tokens % SEQUENCE or options.held_out % SEQUENCE or min(options.tokens, options.held_out) < 1:
        parser.error(f"--tokens and --held-out must be multiples of {SEQUENCE}")
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        writer = context.Process(target=write_cut, args=(folder,))
        writer.start()
        writer.join()
        receiver, sender = context.Pipe(duplex=False)
        worker = context.Process(target=measure, args=(folder, options.tokens, options.held_out, sender))
        worker.start()
        sender.close()
        try:
            result = receiver.recv()
        except EOFError:
            raise SystemExit("the measured process died; see above") from None
        worker.join()
    result |= {
        "layer": "hidden 4096, intermediate 11008, groups of 128",
        "tokens": options.tokens,
        "machine": machine("cpu", torch.get_num_threads()),
        "extrapolated_seconds_32_layers": LAYERS * result["seconds"],
    }
    print(
        f"one layer, {options.tokens} tokens, {result['machine']['cores']} cores: {result['seconds']:.0f} s"
    )
    print(f"peak memory of the process: {result['peak_bytes'] / 1e9:.2f} GB")
    print(
        f"mean output error: rounded to nearest {result['mean_rtn_error']:.2e}, "
        f"GPTQ {result['mean_gptq_error']:.2e}"
    )
    hours = result["extrapolated_seconds_32_layers"] / 3600
    print(f"extrapolation, not measured: {LAYERS} such layers one after another take {hours:.1f} h")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
