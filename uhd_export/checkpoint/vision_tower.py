"""The CLIP whose sizes a checkpoint relies on: the one its config names, or the one that the user names."""

import re
from pathlib import Path

from uhd_export.checkpoint.fields import optional, read_json
from uhd_export.checkpoint.hub import download
from uhd_export.checkpoint.source import locate, whole_folder
from uhd_export.runtime.errors import UhdError

# The base CLIP of the official checkpoints, so that no download is needed to know its shape.
KNOWN_TOWERS = {
    "openai/clip-vit-large-patch14-336": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }
}


# How the hub's cache and its downloads name the folder of OWNER/NAME.
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")


def given_tower(folder: Path, tower: str | Path) -> dict:
    """The CLIP config that the user names."""
    for candidate in (Path(tower), folder / tower):
        if candidate.is_dir():
            return read_json(whole_folder(candidate) / "config.json")
    return KNOWN_TOWERS.get(str(tower)) or read_json(locate(tower, weights=False) / "config.json")


def recorded_tower(folder: Path, raw: dict) -> dict:
    """The CLIP config that config.json names.

    The name was written where the model was trained: it means nothing in the current folder, but what it
    ends with still tells the official CLIP, as does a folder of the hub's cache anywhere in it.
    """
    tower = optional(raw, "mm_vision_tower", str, "")
    parts = [part for part in tower.replace("\\", "/").split("/") if part not in ("", ".")]
    if not parts:
        raise UhdError("config field mm_vision_tower: missing; pass --vision-tower")
    inside = folder / tower  # an absolute path stays what it is
    if _is_dir(inside) and (whole_folder(inside) / "config.json").is_file():
        return read_json(whole_folder(inside) / "config.json")
    cached = next((match for part in reversed(parts) if (match := _CACHED.fullmatch(part))), None)
    name = "/".join(cached.groups()) if cached else "/".join(parts)
    for known, config in KNOWN_TOWERS.items():
        if known.split("/")[-1] == name.split("/")[-1]:
            return config
    try:
        return read_json(download(name if cached else tower.rstrip("/"), ["*.json"]) / "config.json")
    except UhdError as error:
        raise UhdError(f"config field mm_vision_tower: {error}; pass --vision-tower") from None


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # too long, or a zero byte
        return False
