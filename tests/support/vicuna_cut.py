"""Bundles of Vicuna's and ViT-L's width with a few layers, made-up weights, written part by part."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from uhd_export.bundle.build import write_embeddings
from uhd_export.bundle.presets import PRESETS
from uhd_export.checkpoint.config import CheckpointConfig
from uhd_export.checkpoint.options import ImageOptions
from uhd_export.graph import vision as vision_graph
from uhd_export.graph.cache import FloatCache, Int8Cache, LayerScales
from uhd_export.graph.int4.choose import linear_format, resolve
from uhd_export.graph.int8.products import DynamicInt8
from uhd_export.graph.language import emit_language
from uhd_export.graph.vision import emit_vision
from uhd_export.model.folding import FoldedLevel, FoldedProjector
from uhd_export.runtime.bundle.integrity import hash_file
from uhd_export.runtime.bundle.manifest import (
    EMBEDDINGS,
    LANGUAGE,
    SCHEMA_VERSION,
    TOKENIZER,
    VISION,
    FileRecord,
    Manifest,
    Precision,
    Source,
    write_manifest,
)
from uhd_export.runtime.config import official
from uhd_export.study.measure import RandomCheckpoint, checkpoint_config

LAYERS, CONTEXT = 2, 2048


class Repeated(RandomCheckpoint):
    """Tensors that repeat a few thousand numbers: drawing millions takes longer than the test."""

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Of order one after a product; gains are one. No two are equal: ONNX Runtime keeps those once."""
        shape, seed = self._shapes[name], sum(map(ord, name))
        return values(*shape, seed=seed, gain=len(shape) == 1).to(dtype or torch.float32)


def values(*shape: int, seed: int = 0, gain: bool = False) -> torch.Tensor:
    """A tensor of `shape`, or of ones."""
    if gain or not shape:
        return torch.ones(shape)
    some = torch.from_numpy(np.random.default_rng(seed).normal(size=8191).astype(np.float32))
    count = int(np.prod(shape))
    return (some / shape[-1] ** 0.5).repeat(-(-count // len(some)))[:count].reshape(shape)


def folded(config: CheckpointConfig) -> FoldedProjector:
    """The shapes of a folded projector: to fold one of this width takes minutes, to run it does not."""
    p = config.projector
    c, d, n, q = p.vision_hidden, p.hidden, p.side**2, 4 * p.heads
    level = FoldedLevel(values(c, c), values(c), 0.0, values(n, c, q), values(n, q), values(n, q))
    many = len(p.levels)
    return FoldedProjector(
        p.levels, d, (level,) * many, values(n, n, q), values(many, p.heads, c, d // p.heads),
        values(many, p.heads, 2, d // p.heads), values(d), values(d, d), values(d), values(4 * d, d),
        values(d), values(d, d), values(d),
    )  # fmt: skip


def write_cut(folder: Path, preset: str, tokenizer: Path) -> Path:
    """A bundle as `preset` makes it, in `folder`."""
    folder.mkdir()
    model, options = official("Vicuna-7B"), PRESETS[preset].options()
    model = replace(
        model,
        vision=replace(model.vision, layers=LAYERS),
        language=replace(model.language, layers=LAYERS, context=CONTEXT),
    )
    config = checkpoint_config(model)
    checkpoint = Repeated(config)
    weights = options.weights
    if weights.weights == "int4":  # as large as those of GPTQ
        weights = replace(weights, weights="int4-rtn")
    quantization = resolve(checkpoint, config.language, weights)
    whole, vision_graph._fold = vision_graph._fold, lambda config, _: folded(config)
    try:
        products = DynamicInt8() if options.vision_weights == "int8" else None
        emit_vision(config, checkpoint, folder / VISION, products=products, contrib=options.contrib)
    finally:
        vision_graph._fold = whole
    one = np.full((config.language.kv_heads, config.language.head_size), 0.05, np.float32)
    int8 = options.cache_type == "int8"
    emit_language(
        config.language,
        checkpoint,
        folder / LANGUAGE,
        cache=Int8Cache([LayerScales(one, one)] * LAYERS) if int8 else FloatCache(options.cache_type),
        linear=linear_format(checkpoint, config.language, quantization, "onnxruntime"),
        context=CONTEXT,
    )
    embeddings = "float32" if quantization is None else "float16"
    write_embeddings(checkpoint, folder / EMBEDDINGS, embeddings, lambda *_: None)
    (folder / TOKENIZER).write_bytes(tokenizer.read_bytes())
    files = {p.name: FileRecord(p.stat().st_size, hash_file(p)) for p in folder.iterdir()}
    manifest = Manifest(
        SCHEMA_VERSION, "onnxruntime", True, Precision("float32", "float32", embeddings, options.cache_type),
        Source("cut", None, "0" * 64, {}, "branch", None, None, None), model,
        config.settings(ImageOptions(), CONTEXT), {}, (), files, quantization,
    )  # fmt: skip
    write_manifest(folder, manifest)
    return folder
