"""Building TensorRT-RTX engines at real size, without a GPU: seconds, bytes and peak memory.

`language` is a cut of Vicuna-7B's width, two layers and the head, with INT4 weights in groups of 128;
`vision` is ViT-L/14-336 with the folded D = 4096 projector in float16, with plugins and without. Random
weights. Each part is built in a process of its own. The last line is one JSON object.

    python benchmarks/engines.py [--part language] [--compute-capability 8.9] [--json FILE]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PARTS = ("language", "vision", "vision-no-plugins")
LAYERS = 2
GROUP = 128


def build_language(folder: Path, capabilities: tuple[str, ...]) -> dict:
    """Two layers: seconds to write the graph and to build the engine, and sizes."""
    from random_checkpoint import write_checkpoint

    from uhd_export.checkpoint.config import read_config
    from uhd_export.checkpoint.reader import Checkpoint
    from uhd_export.graph.int4.formats import ByName, Int4Dequantize, RoundedWeights
    from uhd_export.graph.language import emit_language
    from uhd_export.graph.linear import Dense
    from uhd_export.tensorrt import EngineOptions, build_engine, language_profiles

    write_checkpoint(folder, language_layers=LAYERS)
    config, checkpoint = read_config(folder).language, Checkpoint(folder)
    form = ByName(Int4Dequantize(RoundedWeights(GROUP)), {"lm_head": Dense()})
    start = time.perf_counter()
    graph = folder / "language.onnx"
    emit_language(config, checkpoint, graph, dtype="float16", dialect="tensorrt", linear=form)
    written = time.perf_counter()
    options = EngineOptions(compute_capabilities=capabilities)
    record = build_engine(graph, folder / "x.engine", language_profiles(config, config.context), options)
    return {
        "layers": LAYERS,
        "context": config.context,
        "graph_seconds": written - start,
        **describe(record, time.perf_counter() - written),
    }


def build_vision(folder: Path, capabilities: tuple[str, ...], plugins: bool) -> dict:
    """The whole vision part."""
    from random_checkpoint import write_checkpoint

    from uhd_export.checkpoint.config import read_config
    from uhd_export.checkpoint.reader import Checkpoint
    from uhd_export.graph.vision import emit_vision
    from uhd_export.tensorrt import EngineOptions, build_engine, vision_profiles

    write_checkpoint(folder)
    config, checkpoint = read_config(folder), Checkpoint(folder)
    start = time.perf_counter()
    graph = folder / "vision.onnx"
    emit_vision(config, checkpoint, graph, dtype="float16")
    written = time.perf_counter()
    options = EngineOptions(compute_capabilities=capabilities, plugins=plugins)
    types = {"tokens": "float16"}
    profiles = vision_profiles(config)
    record = build_engine(graph, folder / "x.engine", profiles, options, output_types=types)
    return {"graph_seconds": written - start, **describe(record, time.perf_counter() - written)}


def describe(record: object, seconds: float) -> dict:
    """What a build gave."""
    from uhd_export.runtime.memory import peak_memory

    return {
        "tensorrt": record.tensorrt,
        "compute_capabilities": list(record.compute_capabilities),
        "build_seconds": seconds,
        "engine_bytes": record.bytes,
        "weight_bytes": record.weight_bytes,
        "profiles": [profile.name for profile in record.profiles],
        "layers_by_type": record.layers,
        "plugin_layers": list(record.plugin_layers),
        "peak_bytes": peak_memory(),
    }


def show(part: str, result: dict) -> None:
    """One line for people."""
    print(
        f"{part}: graph {result['graph_seconds']:.1f} s, engine {result['build_seconds']:.1f} s, "
        f"{result['engine_bytes'] / 1e6:.1f} MB ({result['weight_bytes'] / 1e6:.1f} MB of weights), "
        f"peak {result['peak_bytes'] / 1e9:.1f} GB, plugins {len(result['plugin_layers'])}"
    )


def main() -> None:
    """Build each part in a process of its own, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--compute-capability", action="append", metavar="X.Y")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--alone", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    capabilities = tuple(options.compute_capability or ("8.9",))
    if options.alone:
        with tempfile.TemporaryDirectory() as folder:
            if options.alone == "language":
                result = build_language(Path(folder), capabilities)
            else:
                result = build_vision(Path(folder), capabilities, options.alone == "vision")
        print(json.dumps(result))
        return
    from uhd_export.runtime.profiling.machine import machine

    results = {}
    for part in options.part or PARTS:
        command = [sys.executable, __file__, "--alone", part]
        for capability in capabilities:
            command += ["--compute-capability", capability]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{part}: the build failed")
        results[part] = json.loads(done.stdout.splitlines()[-1])
        show(part, results[part])
    text = json.dumps({"machine": machine("cpu", None), **results})
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
