"""Predicted times of a 1008x672 image and one token on GPUs, from counts and data sheets.

`python benchmarks/gpu_model.py` prints them for an RTX 4090, an H100 and a Jetson AGX Orin. Not measured, and
said so in the JSON. Each stage takes the longer of its bytes over the memory bandwidth and its FLOPs over the
tensor cores' dense float16 peak, both at the shares below, which kernels of this kind reach. Stages follow
each other, and so do the kernels of window attention; launches and the host are not counted.
`benchmarks/gpu.py` puts the same figures beside what it measures.
"""

import json
import sys
from dataclasses import replace

from uhd_export.plugins.roofline import CROPS, image_kernels
from uhd_export.runtime.config import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from uhd_export.runtime.language.decoder import visible
from uhd_export.runtime.profiling.costs import Cost, kv_cache_bytes, language_bytes, stage_costs, total
from uhd_export.runtime.profiling.devices import KNOWN_DEVICES, Device
from uhd_export.runtime.profiling.predict import BANDWIDTH_SHARE, PEAK_SHARE

POSITIONS, CONTEXT = 1066, 4096
INT4_BYTES = 0.5 + 2 / 128  # a weight in groups of 128 with a float16 scale
# Parts of the projector that the kernels of window attention compute; positions are a product before them.
WINDOW_ATTENTION = ("pooling", "scores", "mixing", "value")
VICUNA_7B = LanguageConfig(
    kind="llama", hidden=4096, intermediate=11008, layers=32, heads=32, kv_heads=32, head_size=128,
    vocab=32000, context=CONTEXT, eps=1e-5, rope_theta=10000.0, tied=False, bos=1, eos=(2,),
)  # fmt: skip
VIT_L = VisionConfig(
    hidden=1024, intermediate=4096, layers=23, heads=16, image_size=336, patch=14, eps=1e-5
)  # fmt: skip
MODEL = ModelConfig(VIT_L, ProjectorConfig("hiwin", 4096, 1024, (1, 2, 4), 12), VICUNA_7B)


def stage_times(device: Device) -> dict[str, float]:
    """Milliseconds of each stage on `device`; decode is one token after the prompt, int4, with its cache."""
    grids = [(rows, cols) for count, rows, cols in CROPS for _ in range(count)]
    parts = stage_costs(grids, MODEL, POSITIONS, folded=True)
    for name in WINDOW_ATTENTION:
        del parts["projector"][name]
    costs = {name: total(stage) for name, stage in parts.items()}
    # All but the table of embeddings, of which a token reads one row.
    weights = language_bytes(VICUNA_7B, INT4_BYTES) - 2 * VICUNA_7B.vocab * VICUNA_7B.hidden
    seen = len(visible(POSITIONS + 1, CONTEXT))
    costs["prefill"] = replace(costs["prefill"], weights=weights // 2)
    costs["decode"] = replace(
        costs["decode"], weights=weights // 2, activations=kv_cache_bytes(VICUNA_7B, seen) // 2
    )
    times = {name: time(cost, device) for name, cost in costs.items()}
    times["projector"] += sum(window_attention_times(device).values())
    return times


def window_attention_times(device: Device) -> dict[str, float]:
    """Milliseconds of each kernel of window attention, a part of the projector."""
    return {name: time(cost, device) for name, cost in image_kernels().items()}


def time(cost: Cost, device: Device) -> float:
    """Milliseconds of what moves elements of two bytes."""
    bytes_moved, peak = 2 * cost.elements, PEAK_SHARE * device.flops
    return 1e3 * max(bytes_moved / (BANDWIDTH_SHARE * device.bandwidth), cost.flops / peak)


def predict(device: Device) -> dict[str, dict[str, float] | str]:
    """The times, and a note of what they are."""
    return {
        "what": "predicted from counts, not measured",
        "device": device.name,
        "milliseconds": {name: round(ms, 2) for name, ms in stage_times(device).items()},
        "window_attention": {name: round(ms, 2) for name, ms in window_attention_times(device).items()},
    }


if __name__ == "__main__":
    names = {"RTX 4090", "H100", "Jetson AGX Orin"}
    devices = [device for device in KNOWN_DEVICES if device.name in names]
    json.dump([predict(device) for device in devices], sys.stdout, indent=1)
    print()
