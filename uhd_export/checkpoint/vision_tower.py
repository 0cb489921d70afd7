"""The CLIP whose sizes a checkpoint relies on: the one its config names, or the one that the user names."""

from pathlib import Path

from uhd_export.checkpoint.fields import optional, read_json
from uhd_export.checkpoint.source import download, locate
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


def given_tower(folder: Path, tower: str | Path) -> dict:
    """The CLIP config that the user names."""
    for candidate in (Path(tower), folder / tower):
        if candidate.is_dir():
            return read_json(candidate / "config.json")
    return KNOWN_TOWERS.get(str(tower)) or read_json(locate(tower, weights=False) / "config.json")


def recorded_tower(folder: Path, raw: dict) -> dict:
    """The CLIP config that config.json names.

    The name was written where the model was trained: it means nothing in the current folder, and the
    last part of a path that is not here still tells the official CLIP.
    """
    tower = optional(raw, "mm_vision_tower", str, "")
    if not tower:
        raise UhdError("config field mm_vision_tower: missing; pass --vision-tower")
    inside = folder / tower / "config.json"  # an absolute path stays what it is
    if inside.is_file():
        return read_json(inside)
    for name, config in KNOWN_TOWERS.items():
        if Path(name).name == Path(tower).name:
            return config
    try:
        return read_json(download(tower, ["*.json"]) / "config.json")
    except UhdError as error:
        raise UhdError(f"config field mm_vision_tower: {error}; pass --vision-tower") from None
