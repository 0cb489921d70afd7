"""Checkpoints of any size with random weights, in the official format, for benchmarks."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from uhd_export.checkpoint.config import parse_config
from uhd_export.checkpoint.reader import PROJECTOR_PREFIX, VISION_PREFIX
from uhd_export.checkpoint.vision_tower import KNOWN_TOWERS
from uhd_export.model.language import LanguageModel
from uhd_export.model.projector import HiwinProjector
from uhd_export.model.vit import VisionTower

TOWER = "openai/clip-vit-large-patch14-336"
SHARD_BYTES = 2 << 30
VICUNA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}


def write_checkpoint(folder: Path, *, mask: int = 7, language_layers: int = 0, seed: int = 0) -> Path:
    """Write ViT-L/14-336 and a D = 4096 projector with random weights, bfloat16, into `folder`.

    `language_layers` layers of Vicuna-7B's width follow; with none the language model is left out.
    """
    config = {
        "model_type": "llava_llama",
        "model_mode": "uhd_v2",
        "mm_projector_type": "adapt_spatial_resampler_v2",
        "mm_vision_tower": TOWER,
        "mm_hidden_size": 1024,
        "feature_scale_mask": mask,
        "num_hidden_layers": max(language_layers, 1),
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        **VICUNA_7B,
    }
    parsed = parse_config(config, KNOWN_TOWERS[TOWER])
    with torch.device("meta"):
        parts = [
            (VisionTower(parsed.vision), VISION_PREFIX),
            (HiwinProjector(parsed.projector), PROJECTOR_PREFIX),
        ]
        if language_layers:
            parts.append((LanguageModel(parsed.language), ""))
    folder.mkdir(parents=True, exist_ok=True)
    _write_shards(folder, parts, torch.Generator().manual_seed(seed))
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def _write_shards(folder: Path, parts: list[tuple[torch.nn.Module, str]], generator: torch.Generator) -> None:
    """Random tensors for the parameters of `parts`, a shard in memory at a time, and their index."""
    where: dict[str, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    shapes = [(prefix, name, p.shape) for module, prefix in parts for name, p in module.named_parameters()]
    for i, (prefix, name, shape) in enumerate(shapes, start=1):
        tensors[prefix + name] = _random(name, tuple(shape), generator)
        if i == len(shapes) or sum(tensor.nbytes for tensor in tensors.values()) > SHARD_BYTES:
            file = f"model-{i:05d}.safetensors"
            save_file(tensors, folder / file, metadata={"format": "pt"})
            where |= dict.fromkeys(tensors, file)
            tensors.clear()
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Weights that keep activations of order one, so that no path underflows or saturates."""
    value = torch.randn(shape, generator=generator)
    gain = name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "layrnorm.weight", "sigma_spatial"))
    if gain or (name.startswith("ln_") and name.endswith("weight")):
        value = 1 + 0.1 * value
    elif len(shape) >= 2 and not name.startswith(("query", "pos_embed", "feature_")):
        value = value / float(torch.tensor(shape[1:]).prod()) ** 0.5
    else:
        value = 0.1 * value
    return value.to(torch.bfloat16)
