"""Everything that only a GPU can show, in one JSON object: correctness first, then times.

- `kernels`: JBU and window attention against their references, and their time over the roofline's floor;
- `vision`: a 1008x672 image (7 crops, ViT-L/14, D = 4096, float16), folded with kernels, against the
  released computation in eager PyTorch and under torch.compile, by stage, and over the ViT's own products;
- `vision_engines`: the same graph in TensorRT, with plugins and without, and in ONNX Runtime's CUDA provider;
- `decode`: an int4 model of Vicuna-7B's size, a token over its bandwidth floor, in both.

Beside them stands what `gpu_model.py` predicts for the GPU, as `predicted`.

Random weights. Needs the project installed (`pip install --no-deps -e .` is enough), a CUDA GPU and PyTorch
built for it; what else is missing, and what fails, is named
under its part, and the others are measured all the same. Exits with 1 where something failed.

    python benchmarks/gpu.py [--part kernels] [--layers 32] [--repeats 20] [--json FILE]
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from attempts import attempt, failures, require

PARTS = ("kernels", "vision", "vision_engines", "decode")
MISSING = 2
DEVICE = "cuda"
LIMIT = 5e-2  # relative error of float16 against float32
CONTEXT, PROMPT, STEPS = 2048, 1066, 64


def relative(actual: Sequence, expected: Sequence) -> float:
    """The largest |a - b| / |b| of pairs of arrays or tensors."""
    import numpy as np

    pairs = [[np.asarray(part, np.float64) for part in pair] for pair in zip(actual, expected, strict=True)]
    return float(max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs))


def wall(run: Callable[[], object], repeats: int, warm: float) -> float:
    """Median seconds of `run`, which returns when the work is done, after `warm` seconds of it."""
    begun = time.perf_counter()
    while time.perf_counter() - begun < warm:
        run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure_kernels(options: argparse.Namespace, machine: dict) -> dict:
    """benchmarks/kernels.py in float16."""
    import kernels

    device = kernels.find_device(machine["gpu"])
    return {"floor_of": device.name, "cases": kernels.measure_all("float16", device, options.repeats)}


def measure_vision(options: argparse.Namespace, machine: dict) -> dict:
    """Stages and whole, in milliseconds, for the whole image."""
    import gpu_vision
    import kernels
    import torch
    from random_checkpoint import write_checkpoint

    from uhd_export.plugins.roofline import CROPS

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder))
        expected = exact_tokens(checkpoint, CROPS)

        def measured(kind: type) -> dict:
            model = kind(checkpoint, DEVICE, torch.float16)
            batches = [model.batch(shape) for shape in CROPS]
            tokens = [model.encode(batch).float().cpu() for batch in batches]
            error = require(f"vision, {kind.__name__}", relative(tokens, expected), LIMIT)
            products = [gpu_vision.vit_products(model, batch) for batch in batches]
            least = kernels.milliseconds(lambda: [run() for run in products], options.repeats)["median"]
            return {"error": error, **stages(model, batches, options.repeats), "vit_products_ms": least}

        # Ours first: what goes wrong later costs comparisons only.
        kinds = {"ours": gpu_vision.Ours, "eager": gpu_vision.Released, "compiled": gpu_vision.Compiled}
        result: dict = {"crops": CROPS}
        for name, kind in kinds.items():
            result[name] = attempt(lambda k=kind: measured(k))
            torch.cuda.empty_cache()
    ours = result["ours"]
    if "all_ms" in ours:
        result["over_vit_products"] = ours["all_ms"] / ours["vit_products_ms"]
    for name in ("eager", "compiled"):
        if "all_ms" in ours and "all_ms" in result[name]:
            result[f"speedup_{name}"] = speedups(ours, result[name])
    return result


def speedups(ours: dict, theirs: dict) -> dict:
    """How many times as fast as theirs our projector and our whole vision path are."""

    def projector(times: dict) -> float:
        return times["jbu_ms"] + times["hiwin_ms"]

    return {"projector": projector(theirs) / projector(ours), "vision": theirs["all_ms"] / ours["all_ms"]}


def stages(model: object, batches: list, repeats: int) -> dict:
    """Median milliseconds of each stage over all batches, and of the whole."""
    import kernels

    features = [model.vit(batch) for batch in batches]
    maps = [model.jbu(f, batch) for f, batch in zip(features, batches, strict=True)]
    runs = {
        "vit": lambda: [model.vit(batch) for batch in batches],
        "jbu": lambda: [model.jbu(f, batch) for f, batch in zip(features, batches, strict=True)],
        "hiwin": lambda: [model.hiwin(m, batch) for m, batch in zip(maps, batches, strict=True)],
        "all": lambda: [model.encode(batch) for batch in batches],
    }
    return {f"{name}_ms": kernels.milliseconds(run, repeats)["median"] for name, run in runs.items()}


def measure_vision_engines(options: argparse.Namespace, machine: dict) -> dict:
    """The exported graph in each engine, or why not."""
    import gpu_engines
    import torch
    from random_checkpoint import write_checkpoint

    from uhd_export.checkpoint.config import read_config
    from uhd_export.checkpoint.reader import Checkpoint
    from uhd_export.graph.vision import emit_vision
    from uhd_export.plugins.roofline import CROPS

    capability = machine["capability"]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder))
        config, graph = read_config(checkpoint), Path(folder) / "vision.onnx"
        emit_vision(config, Checkpoint(checkpoint), graph, dtype="float16")
        expected = exact_tokens(checkpoint, CROPS)
        torch.cuda.empty_cache()

        def tensorrt(plugins: bool) -> Callable:
            engine = gpu_engines.vision_engine(graph, config, capability, plugins=plugins)
            return gpu_engines.tensorrt_encode(engine, CROPS)

        def measured(name: str, make: Callable) -> dict:
            run = make()
            error = require(f"vision, {name}", relative(run(fetch=True), expected), LIMIT)
            return {"error": error, "all_ms": 1e3 * wall(run, options.repeats, gpu_engines.WARM_SECONDS)}

        configurations = {
            "tensorrt_plugins": lambda: tensorrt(True),
            "tensorrt_plain": lambda: tensorrt(False),
            "onnxruntime_cuda": lambda: gpu_engines.onnxruntime_encode(graph, CROPS),
        }
        return {name: attempt(lambda n=name, m=make: measured(n, m)) for name, make in configurations.items()}


def exact_tokens(checkpoint: Path, shapes: Sequence[tuple[int, int, int]]) -> list:
    """Tokens of the released computation in float32."""
    import gpu_vision
    import torch

    exact = gpu_vision.Released(checkpoint, DEVICE, torch.float32)
    return [exact.encode(exact.batch(shape)).float().cpu() for shape in shapes]


def measure_decode(options: argparse.Namespace, machine: dict) -> dict:
    """A token's time over the time that reading weights and cache once takes."""
    import gpu_engines
    import kernels
    from decode_runners import llama_config
    from random_checkpoint import VICUNA_7B

    fields = {**VICUNA_7B, "num_hidden_layers": options.layers, "max_position_embeddings": CONTEXT}
    config, bandwidth = llama_config(fields), kernels.find_device(machine["gpu"]).bandwidth

    def measured(kind: str, folder: Path) -> dict:
        error = gpu_engines.language_error(config, folder, kind, machine["capability"])
        error = require(f"decode, {kind}", error, LIMIT)
        engine, _ = gpu_engines.language_engine(config, folder, kind, machine["capability"], CONTEXT)
        with engine:
            times = gpu_engines.decode_times(engine, config, CONTEXT, PROMPT, STEPS)
            # Positions in use while decoding, of those that the cache has room for.
            cache = times["kv_bytes"] * (PROMPT + STEPS / 2) / CONTEXT
            floor = (engine.weight_bytes + cache) / bandwidth
            over = times["step_seconds"] / floor
            bytes_ = {"weight_bytes": engine.weight_bytes}
            return {"error": error, **bytes_, **times, "floor_seconds": floor, "over_floor": over}

    result: dict = {"layers": options.layers, "prompt": PROMPT, "context": CONTEXT}
    for kind in ("tensorrt", "onnxruntime"):
        with tempfile.TemporaryDirectory() as folder:
            result[kind] = attempt(lambda k=kind, f=Path(folder): measured(k, f))
    return result


def describe_machine() -> dict:
    """What the figures were taken on."""
    import torch

    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
    }


def main() -> None:
    """Measure the parts asked for; print one JSON object, the last line of the output."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--layers", type=int, default=32, help="layers of the decode model; 32 is Vicuna-7B")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, help="also write the result here, after each part")
    options = parser.parse_args()
    try:
        import torch
    except ImportError:
        torch = None
    if torch is None or not torch.cuda.is_available():
        print("benchmarks/gpu.py: not measured: no CUDA GPU that PyTorch can use is at hand", file=sys.stderr)
        sys.exit(MISSING)
    torch.set_grad_enabled(False)
    import gpu_model
    import kernels

    result: dict = {"machine": describe_machine()}
    result["predicted"] = gpu_model.predict(kernels.find_device(result["machine"]["gpu"]))
    for part in options.part or PARTS:
        print(f"{part} ...", file=sys.stderr, flush=True)
        measure = globals()[f"measure_{part}"]
        result[part] = attempt(lambda m=measure: m(options, result["machine"]))
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    if failed := list(failures(result)):
        sys.exit("\n".join(f"benchmarks/gpu.py: {line}" for line in failed))


if __name__ == "__main__":
    main()
