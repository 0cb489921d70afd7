"""Checkpoints of any size with random weights, in the official format, for benchmarks."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from safetensors.torch import save_file

from uhd_export.checkpoint.config import parse_config
from uhd_export.checkpoint.int4.linears import linear_shapes
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


def write_checkpoint(
    folder: Path,
    *,
    mask: int = 7,
    language_layers: int = 0,
    group: int | None = None,
    vision: bool = True,
    sizes: Mapping[str, int] = MappingProxyType(VICUNA_7B),
    seed: int = 0,
) -> Path:
    """Write ViT-L/14-336 and a D = 4096 projector with random weights, bfloat16, into `folder`.

    `language_layers` layers of Vicuna-7B's width follow; with none the language model is left out. With
    `group` their linear layers are GPTQ's integers in groups of so many inputs: a quarter of the bytes.
    Without `vision` they are alone. `sizes` are fields of the language model's config.
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
        **sizes,
    }
    parsed = parse_config(config, KNOWN_TOWERS[TOWER])
    with torch.device("meta"):
        parts: list[tuple[torch.nn.Module, str]] = [
            (VisionTower(parsed.vision), VISION_PREFIX),
            (HiwinProjector(parsed.projector), PROJECTOR_PREFIX),
        ][: 2 * vision]
        if language_layers:
            parts.append((LanguageModel(parsed.language), ""))
    if group is not None:
        config["quantization_config"] = {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": group,
            "sym": True,
            "desc_act": False,
            "checkpoint_format": "gptq",
        }
    quantized = {} if group is None else linear_shapes(parsed.language)
    folder.mkdir(parents=True, exist_ok=True)
    _write_shards(folder, _tensors(parts, quantized, group or 1, seed))
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


Tensors = Iterator[tuple[str, Callable[[], torch.Tensor]]]


def _tensors(
    parts: list[tuple[torch.nn.Module, str]], quantized: dict[str, tuple[int, int]], group: int, seed: int
) -> Tensors:
    """Names, and what makes each tensor: of the parameters, or of GPTQ's integers in their place."""
    generator = torch.Generator().manual_seed(seed)
    integers = np.random.default_rng(seed)
    for module, prefix in parts:
        for name, parameter in module.named_parameters():
            linear = (prefix + name).removesuffix(".weight")
            if linear in quantized:
                yield from _gptq(linear, *quantized[linear], group, integers)
            else:
                shape = tuple(parameter.shape)
                yield prefix + name, lambda name=name, shape=shape: _random(name, shape, generator)


def _gptq(name: str, outputs: int, inputs: int, group: int, random: np.random.Generator) -> Tensors:
    """Codes drawn evenly, zero points in the middle, scales for outputs of order one."""

    def codes() -> torch.Tensor:
        return torch.from_numpy(random.integers(-(2**31), 2**31, (inputs // 8, outputs), np.int32))

    scale = 12**0.5 / 16 / inputs**0.5
    yield f"{name}.qweight", codes
    yield f"{name}.qzeros", lambda: torch.full((inputs // group, outputs // 8), 0x77777777, dtype=torch.int32)
    yield f"{name}.scales", lambda: torch.full((inputs // group, outputs), scale, dtype=torch.float16)
    yield f"{name}.g_idx", lambda: torch.arange(inputs, dtype=torch.int32) // group


def _write_shards(folder: Path, made: Tensors) -> None:
    """The tensors, a shard in memory at a time, and their index."""
    where: dict[str, str] = {}
    tensors: dict[str, torch.Tensor] = {}

    def write() -> None:
        file = f"model-{len(set(where.values())) + 1:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, file))
        tensors.clear()

    for name, make in made:
        tensors[name] = make()
        if sum(tensor.nbytes for tensor in tensors.values()) > SHARD_BYTES:
            write()
    if tensors:
        write()
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
