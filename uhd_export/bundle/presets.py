"""Presets: options of a bundle that belong together; what is asked for explicitly goes before them."""

import json
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

from uhd_export.bundle.options import BuildOptions
from uhd_export.graph.int4.options import WeightOptions
from uhd_export.runtime.choices import ENGINE_BACKENDS


@dataclass(frozen=True)
class Preset:
    """Fields of WeightOptions and BuildOptions. None is the backend's own, `cache` None as `dtype`."""

    weights: str
    lm_head: str
    vision_weights: str
    cache: str | None = None
    dtype: str | None = None

    def options(self) -> BuildOptions:
        """A build for ONNX Runtime with these and otherwise default options."""
        weights = WeightOptions(weights=self.weights, lm_head=self.lm_head)
        vision, cache = self.vision_weights, self.cache
        return BuildOptions(weights=weights, vision_weights=vision, cache=cache, dtype=self.dtype)


PRESETS = {
    "exact": Preset("dense", "dense", "dense", dtype="float32"),
    "balanced": Preset("int4", "int8", "int8", "int8"),
    "small": Preset("int4", "int4", "int8", "int8"),
}


def adapted(name: str, backend: str, dtype: str | None = None) -> tuple[Preset, dict[str, str]]:
    """Preset `name` as `backend` runs it with `dtype`, and for fields that it has to change, why."""
    preset, reasons = PRESETS[name], {}
    if backend in ENGINE_BACKENDS and preset.lm_head == "int8":
        preset = replace(preset, lm_head="dense")
        reasons["lm_head"] = f"{backend} has no 8-bit head; it is float16"
    if backend in ENGINE_BACKENDS and preset.cache is not None:
        preset = replace(preset, cache=None)
        reasons["cache"] = f"{backend} has no {PRESETS[name].cache} cache; it is float16"
    if backend not in ENGINE_BACKENDS and dtype == "float16" and preset.vision_weights == "int8":
        preset = replace(preset, vision_weights="dense")
        reasons["vision_weights"] = "ONNX Runtime's 8-bit vision wants float32 activations; it is float16"
    return preset, reasons


@cache
def measured() -> dict[str, Any]:
    """What `python benchmarks/presets.py` measured: the embedded model by preset, and rates of building."""
    text = files("uhd_export.nano").joinpath("presets.json").read_text(encoding="utf-8")
    return dict(json.loads(text))
