"""How the inputs of the golden tensors are made, so that they need not be stored.

Images use integer arithmetic and weights a generator seeded by their name, so that every machine
makes the same bits.
"""

import hashlib
import json
import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
POSITION = "model.mm_projector.pos_embed"

# (pattern of the tensor's name, mean, standard deviation); the first that matches counts. A negative
# deviation is divided by the square root of the fan-in.
_SCALES = (
    (r"range_temp$", 0.0, 0.3),
    (r"sigma_spatial$", 1.0, 0.1),
    (r"(norm|ln_[a-z]+|layrnorm|layer_norm\d)\.weight$", 1.0, 0.1),
    (r"bias$", 0.0, 0.05),
    (r"embed_tokens\.weight$", 0.0, 1.0),
    (r"lm_head\.weight$", 0.0, 0.25),
    (r"(class_embedding|position_embedding\.weight|feature_\dx_embedding)$", 0.0, 0.5),
    (r"\.query(_\d)?$", 0.0, 1.0),
    (r"range_proj\.3\.weight$", 0.0, -0.4),
    (r"attn\.in_proj_weight$", 0.0, -1.5),
    (r"", 0.0, -1.0),
)


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 values, all representable in bfloat16, of checkpoint tensor `name`."""
    if name == POSITION:
        return _round_bf16(_sin_cos(shape[0], shape[1]))
    mean, std = next((m, s) for pattern, m, s in _SCALES if re.search(pattern, name))
    if std < 0:
        std = -std / int(np.prod(shape[1:])) ** 0.5
    generator = np.random.RandomState(zlib.crc32(name.encode()))
    value = _round_bf16((mean + std * generator.standard_normal(tuple(shape))).astype(np.float32))
    return np.where(np.abs(value) < 2.0**-14, np.float32(0), value)


def image(width: int, height: int, seed: int = 0) -> np.ndarray:
    """A uint8 RGB image of shape (height, width, 3)."""
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)

    def triangle(t: np.ndarray) -> np.ndarray:
        return np.minimum(np.abs((t % 512) - 256), 255)

    red = triangle(3 * x + 2 * y + 31 * seed)
    green = triangle(5 * y + (x * x) // 128 + 64)
    blue = np.where((x // 23 + y // 17 + seed) % 3 == 0, 255, triangle(x + 4 * y))
    return np.stack([red, green, blue], -1).astype(np.uint8)


def normal(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 values."""
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def photo(width: int, height: int, seed: int) -> np.ndarray:
    """A uint8 RGB image as a photograph is: gradients, coarse edges and grain."""
    base = image(width, height, seed).astype(np.int64)
    generator = np.random.RandomState(seed)
    coarse = generator.randint(0, 256, (max(height // 40, 2), max(width // 40, 2), 3))
    rows, cols = np.arange(height) // 40, np.arange(width) // 40
    edges = coarse[np.minimum(rows, len(coarse) - 1)][:, np.minimum(cols, coarse.shape[1] - 1)]
    grain = generator.randint(-20, 21, (height, width, 3))
    return np.clip((base + 2 * edges) // 3 + grain, 0, 255).astype(np.uint8)


def tensors(name: str = "checkpoint") -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint whose shapes are in NAME.json, in bfloat16."""
    shapes = json.loads((HERE / f"{name}.json").read_text())["shapes"]
    return {n: torch.from_numpy(weight(n, tuple(s))).to(torch.bfloat16) for n, s in shapes.items()}


def digest(state: dict[str, torch.Tensor]) -> str:
    """sha256 over the names and raw bfloat16 values, sorted by name."""
    out = hashlib.sha256()
    for name in sorted(state):
        out.update(name.encode())
        out.update(state[name].view(torch.uint16).numpy().tobytes())
    return out.hexdigest()


# What each checkpoint is made of: shapes, its config and its CLIP's.
_CHECKPOINTS = {"v2_mask7": ("checkpoint", "clip"), "v1q64": ("v1q64", "clip_v1q64")}


def write_checkpoint(folder: Path, config: str = "v2_mask7") -> Path:
    """The checkpoint of configs/CONFIG.json, and its CLIP's config under `clip`, in `folder`."""
    shapes, tower = _CHECKPOINTS[config]
    (folder / "clip").mkdir(parents=True)
    save_file(tensors(shapes), folder / "model.safetensors")
    shutil.copy(HERE / "configs" / f"{config}.json", folder / "config.json")
    shutil.copy(HERE / "configs" / f"{tower}.json", folder / "clip" / "config.json")
    return folder


def _round_bf16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.asarray(values, np.float32)).to(torch.bfloat16).float().numpy()


def _sin_cos(count: int, channels: int) -> np.ndarray:
    """2-D sine-cosine table (count, channels), columns in the first half of the channels."""
    side, quarter = int(count**0.5), channels // 4
    frequency = 1 / 10000 ** (np.arange(quarter, dtype=np.float32) / quarter)
    column, row = np.meshgrid(np.arange(side, dtype=np.float32), np.arange(side, dtype=np.float32))
    angles = (np.outer(axis.ravel(), frequency) for axis in (column, row))
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], 1)
