"""The embedded model's configuration, its modules with fresh weights, and how both are saved."""

import json
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from uhd_export.checkpoint.config import CheckpointConfig, parse_config
from uhd_export.checkpoint.reader import PROJECTOR_PREFIX, VISION_PREFIX
from uhd_export.model.jbu import JbuStack, matrices
from uhd_export.model.language import LanguageModel, RMSNorm
from uhd_export.model.projector import HiwinProjector
from uhd_export.model.vit import Layer, VisionTower
from uhd_export.runtime.files import replacing, write_file

TOWER_FOLDER = "clip"
TOWER = {
    "architectures": ["CLIPVisionModel"],
    "model_type": "clip_vision_model",
    "hidden_act": "quick_gelu",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "image_size": 336,
    "patch_size": 14,
    "num_channels": 3,
    "projection_dim": 128,
    "layer_norm_eps": 1e-5,
    "torch_dtype": "float16",
}
LANGUAGE = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava_llama",
    "hidden_act": "silu",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "float16",
}
MULTIMODAL = {
    "model_mode": "uhd_v2",
    "mm_projector_type": "adapt_spatial_resampler_v2",
    "feature_scale_mask": 7,
    "mm_vision_tower": TOWER_FOLDER,
    "mm_hidden_size": 128,
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_patch_merge_type": "flat",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "use_mm_proj": True,
    "jbu_ckpt": None,
}


def raw_config(vocab: int, separators: list[int]) -> dict:
    """The checkpoint's config.json for a vocabulary of `vocab` and the two separators' ids."""
    return {**LANGUAGE, "vocab_size": vocab, **MULTIMODAL, "mm_separator_token_ids": separators}


def typed_config(vocab: int, separators: list[int]) -> CheckpointConfig:
    """The same as `load_model` reads it."""
    return parse_config(raw_config(vocab, separators), TOWER)


def fresh_vision(config: CheckpointConfig) -> tuple[VisionTower, HiwinProjector]:
    """Vision tower and projector with initial weights from torch's global generator."""
    tower, projector = VisionTower(config.vision), HiwinProjector(config.projector)
    for module in (*tower.modules(), *projector.modules()):
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    embeddings = tower.embeddings
    nn.init.normal_(embeddings.class_embedding, std=0.02)
    # Sines, so that a patch can find its neighbour: the middle digit of a code spans two patches.
    side, channels = config.vision.table, config.vision.hidden
    with torch.no_grad():
        embeddings.position_embedding.weight[0] = 0
        embeddings.position_embedding.weight[1:] = 0.5 * torch.from_numpy(sine_table(side, channels))
    d = config.projector.hidden
    with torch.no_grad():
        projector.pos_embed.copy_(torch.from_numpy(sine_table(config.projector.side, d)))
    nn.init.xavier_uniform_(projector.attn.in_proj_weight)
    start_queries(projector)
    nn.init.zeros_(projector.attn.in_proj_bias)
    nn.init.normal_(projector.proj, std=d**-0.5)
    for name, parameter in projector.named_parameters():
        if name.endswith("x_embedding"):
            nn.init.normal_(parameter, std=0.02)
    stack = projector.upsampler.upsampler
    assert isinstance(stack, JbuStack)  # nano's own
    for i in range(len(stack.scales)):
        stage = getattr(stack, f"up{i + 1}")
        nn.init.zeros_(stage.range_temp)
        # 0.3 of the kernel's half width: a neighbourhood of about one source pixel.
        nn.init.constant_(stage.sigma_spatial, 0.3)
        nn.init.zeros_(stage.fixup_proj[3].bias)
        nn.init.normal_(stage.fixup_proj[3].weight, std=0.01)
    nn.init.zeros_(matrices(stack.fixup_proj, 1)[1])
    return tower, projector


@torch.no_grad()
def start_queries(projector: HiwinProjector) -> None:
    """Let each of the four query sets begin by looking at its own quadrant of the windows.

    Otherwise all four settle on the same bin, and what is printed beside it is never learned.
    """
    d, third = projector.pos_embed.shape[1], 1 / 3
    axes = {}
    for name, dx, dy in (("x", third, 0.0), ("y", 0.0, third)):
        difference = sine_table(projector.side, d, dx, dy) - sine_table(projector.side, d, -dx, -dy)
        axes[name] = torch.from_numpy(difference)
    for i, (x, y) in enumerate(((-1, -1), (1, -1), (-1, 1), (1, 1)), 1):
        getattr(projector, f"query_{i}").copy_(x * axes["x"] + y * axes["y"])
    # Scores are then dot products of positions: scaled so that neighbouring bins differ by 1 to 2 nats.
    projector.attn.in_proj_weight[: 2 * d] = 3**0.5 * torch.eye(d).repeat(2, 1)


def fresh_language(config: CheckpointConfig) -> LanguageModel:
    """The language model with initial weights from torch's global generator."""
    model = LanguageModel(config.language)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
    nn.init.normal_(model.model.embed_tokens.weight, std=0.5)
    for layer in model.model.layers:
        for out in (layer.self_attn.o_proj, layer.mlp.down_proj):
            nn.init.normal_(out.weight, std=(out.in_features * 2 * config.language.layers) ** -0.5)
    return model


def sine_table(side: int, channels: int, dx: float = 0.0, dy: float = 0.0) -> np.ndarray:
    """(side^2, channels) two-dimensional sines and cosines; the first half encodes the column.

    `dx` and `dy` move the grid by a fraction of a cell.
    """
    frequency = 10000.0 ** (-np.arange(channels // 4) / (channels // 4))
    lines = []
    for shift in (dx, dy):
        angles = (np.arange(side)[:, None] + shift) * frequency
        lines.append(np.concatenate([np.sin(angles), np.cos(angles)], 1))
    columns, rows = np.tile(lines[0], (side, 1)), np.repeat(lines[1], side, 0)
    return np.concatenate([columns, rows], 1).astype(np.float32)


def save_checkpoint(
    folder: Path, raw: dict, tower: VisionTower, projector: HiwinProjector, language: LanguageModel
) -> None:
    """Write config.json, the tower's config.json and float16 model.safetensors under official names.

    The tower gets a last layer and a `post_layernorm` that nothing runs, as official checkpoints have.
    """
    (folder / TOWER_FOLDER).mkdir(parents=True, exist_ok=True)
    tensors = {}
    parts: dict[str, nn.Module] = {VISION_PREFIX: tower, PROJECTOR_PREFIX: projector, "": language}
    for prefix, part in parts.items():
        for name, tensor in part.named_parameters():
            tensors[prefix + name] = tensor
    vision = typed_config(raw["vocab_size"], raw["mm_separator_token_ids"]).vision
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unused: dict[str, nn.Module] = {f"encoder.layers.{vision.layers}.": Layer(vision)}
        unused["post_layernorm."] = nn.LayerNorm(vision.hidden, vision.eps)
    for prefix, part in unused.items():
        for name, tensor in part.named_parameters():
            tensors[VISION_PREFIX + prefix + name] = tensor
    half = {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in tensors.items()}
    if not all(math.isfinite(float(t.float().abs().max())) for t in half.values()):
        raise ValueError("a weight does not fit float16")
    with replacing(folder / "model.safetensors") as partial:
        save_file(half, partial, metadata={"format": "pt"})
        partial.chmod(0o644)  # safetensors writes files that only their owner may read
    write_json(folder / "config.json", raw)
    write_json(folder / TOWER_FOLDER / "config.json", TOWER)


def write_json(path: Path, value: dict) -> None:
    """Write indented JSON, whole or not at all."""
    write_file(path, json.dumps(value, indent=2) + "\n")
