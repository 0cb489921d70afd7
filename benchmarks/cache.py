"""One layer's attention of Vicuna's width by the type of its cache: a prompt, a step, and a further turn.

Of eight layers, since one's cache would stay in the processor's. In turns, on one thread, in CPU time: on a
machine that does other things too, ratios stay. A prompt runs as the runtime has it, 256 positions at a time.
"int8, by blocks" is ONNX Runtime's default for a cache of 8 bits, which the runtime turns off
(`runtime/engines/attention.py`).

    python benchmarks/cache.py [--positions 1066] [--repeats 5] [--json FILE]
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir

from uhd_export.graph.cache import CacheFormat, FloatCache, Int8Cache, LayerScales
from uhd_export.graph.dialects import rotary_cache
from uhd_export.graph.grouped_attention import GroupedAttention
from uhd_export.plugins.graph import GraphBuilder
from uhd_export.runtime.config import LanguageConfig
from uhd_export.runtime.engines.onnxruntime import OrtEngine
from uhd_export.runtime.language.decoder import (
    ENOUGH_POSITIONS,
    KEY_VALUE,
    PAST,
    PRESENT,
    ROWS,
    SEQUENCE_LENGTHS,
    TOTAL_LENGTH,
    WRITE_INDEX,
)
from uhd_export.runtime.profiling.machine import machine

HEADS, SIZE, CAPACITY, LAYERS = 32, 128, 4096, 8
VICUNA = LanguageConfig(
    kind="llama",
    hidden=HEADS * SIZE,
    intermediate=11008,
    layers=LAYERS,
    heads=HEADS,
    kv_heads=HEADS,
    head_size=SIZE,
    vocab=32000,
    context=CAPACITY,
    eps=1e-5,
    rope_theta=10000.0,
    tied=False,
    bos=1,
    eos=(2,),
)
FLOAT = ir.DataType.FLOAT
SWITCH, BY_BLOCKS = "ORT_GQA_DISABLE_FLASH_ATTENTION", "int8, by blocks"


def emit(cache: CacheFormat, path: Path) -> Path:
    """A graph of the attentions alone, each from the same q, k and v side by side."""
    builder = GraphBuilder("attention", opset=24)
    qkv = builder.input("qkv", FLOAT, (ROWS, "sequence", 3 * HEADS * SIZE))
    shape = (ROWS, HEADS, "capacity", SIZE)
    pasts = [
        [builder.input(PAST.format(layer, part), cache.type, shape) for part in KEY_VALUE]
        for layer in range(LAYERS)
    ]
    lengths = builder.input(SEQUENCE_LENGTHS, ir.DataType.INT32, (ROWS,))
    total = builder.input(TOTAL_LENGTH, ir.DataType.INT32, ())
    kind = cache.type if isinstance(cache, FloatCache) else FLOAT
    tables = [
        builder.weight(name, table.shape, kind, lambda table=table: table)
        for name, table in zip(("cos", "sin"), rotary_cache(VICUNA, CAPACITY), strict=True)
    ]
    attention = GroupedAttention(builder, VICUNA, cache, FLOAT, qkv, lengths, total, tables)
    for layer, past in enumerate(pasts):
        out, *present = attention.emit(layer, qkv, past)
        builder.output(out, f"out.{layer}", FLOAT, (ROWS, "sequence", HEADS * SIZE))
        for value, part in zip(present, KEY_VALUE, strict=True):
            builder.output(value, PRESENT.format(layer, part), cache.type, shape, direct=True)
    builder.save(path)
    return path


class Side:
    """One type of cache."""

    def __init__(self, cache: CacheFormat, path: Path, *, by_blocks: bool = False) -> None:
        # The runtime leaves a choice that is made alone.
        if by_blocks:
            os.environ[SWITCH] = "0"
        self.engine = OrtEngine(emit(cache, path), threads=1)
        os.environ.pop(SWITCH, None)
        shared = {
            PAST.format(layer, part): PRESENT.format(layer, part)
            for layer in range(LAYERS)
            for part in KEY_VALUE
        }
        self.binding = self.engine.bind(shared, {"capacity": CAPACITY, ROWS: 1})

    def run(self, qkv: np.ndarray, past: int) -> float:
        """Seconds of CPU time, a layer."""
        length, seconds = qkv.shape[1], 0.0
        for start in range(0, length, ENOUGH_POSITIONS):
            part = qkv[:, start : start + ENOUGH_POSITIONS]
            total = past + start + part.shape[1]
            feeds = {
                "qkv": part,
                SEQUENCE_LENGTHS: np.array([total - 1], np.int32),
                TOTAL_LENGTH: np.array(total, np.int32),
                WRITE_INDEX: np.array([past + start]),
            }
            begun = time.process_time()
            self.binding.infer({name: feed for name, feed in feeds.items() if name in self.engine.inputs})
            seconds += time.process_time() - begun
        return seconds / LAYERS


def measure(positions: int, repeats: int) -> dict[str, dict[str, float]]:
    """Median milliseconds by run and type of the cache."""
    rng = np.random.default_rng(0)
    scales = np.full((HEADS, SIZE), 5 / 127, np.float32)
    formats = {
        "float32": FloatCache("float32"),
        "float16": FloatCache("float16"),
        "int8": Int8Cache([LayerScales(scales, scales)] * LAYERS),
        BY_BLOCKS: Int8Cache([LayerScales(scales, scales)] * LAYERS),
    }
    runs = {"prompt": (positions, 0), "step": (1, positions), "turn of 128": (128, positions)}
    seconds: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        sides = {
            name: Side(cache, Path(folder) / f"{name}.onnx", by_blocks=name == BY_BLOCKS)
            for name, cache in formats.items()
        }
        for _ in range(repeats + 1):  # the first warms up
            for run, (length, past) in runs.items():
                qkv = rng.standard_normal((1, length, 3 * HEADS * SIZE), np.float32)
                for name, side in sides.items():
                    times = [side.run(qkv, past) for _ in range(10 if length == 1 else 1)]
                    seconds.setdefault((run, name), []).append(float(np.median(times)))
        for side in sides.values():
            side.engine.close()
    return {run: {name: 1e3 * float(np.median(seconds[run, name][1:])) for name in formats} for run in runs}


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--positions", type=int, default=1066)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = measure(options.positions, options.repeats)
    for run, found in result.items():
        parts = (f"{name} {ms:.2f} ms ({ms / found['float32']:.2f})" for name, ms in found.items())
        print(f"{run}: {', '.join(parts)}")
    if options.json:
        facts = {"machine": machine("cpu", 1), "milliseconds": result}
        options.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
