"""Engines for TensorRT and TensorRT-RTX from the ONNX graphs, built without a GPU where the backend can."""

from uhd_export.tensorrt.builder import build_engine
from uhd_export.tensorrt.cache import cached_engine, engine_key
from uhd_export.tensorrt.options import DEFAULT_CAPABILITIES, EngineOptions
from uhd_export.tensorrt.profiles import language_profiles, possible_grids, vision_profiles

__all__ = [
    "DEFAULT_CAPABILITIES",
    "EngineOptions",
    "build_engine",
    "cached_engine",
    "engine_key",
    "language_profiles",
    "possible_grids",
    "vision_profiles",
]
