"""Checkpoints: locate a folder or hub id, and read its tensors one at a time."""

import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from runtime.errors import UhdError
from uhd_export.config import KNOWN_TOWERS, ModelConfig, parse_config
from uhd_export.fields import optional, read_json
from uhd_export.nano import checkpoint_path
from uhd_export.provenance import NANO

VISION_PREFIX = "model.vision_tower.vision_tower.vision_model."
PROJECTOR_PREFIX = "model.mm_projector."
# Tensors that official checkpoints hold and some configuration does not use: the second CLIP, levels
# and stages that the mask leaves out, the other projector generation's parts.
_UNUSED = re.compile(
    r"mm_projector\.(query(_\d)?|pos_embed|proj|(kv|cat)_proj\.\w+|ln_(q|kv|proj|post)\.\w+|attn\..*"
    r"|upsampler\.(model|upsampler)\..*|features_\dx_projector\.\w+|feature_\dx_embedding)$"
    r"|vision_model\.(post_layernorm\..*|embeddings\.position_ids)$"
    r"|rotary_emb\.inv_freq$|model\.image_newline$"
)
HUB_PATTERNS = ["*.json", "*.safetensors", "tokenizer.model", "merges.txt"]


def source_folder(source: str | Path) -> Path:
    """The local folder of `source`: "nano", a folder, or a hub id (downloaded and cached)."""
    return checkpoint_path() if str(source) == NANO else locate(source)


def locate(source: str | Path, *, weights: bool = True) -> Path:
    """The local folder of `source`, a folder or a Hugging Face hub id (downloaded and cached)."""
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise UhdError(f"checkpoint {source}: is a file; pass the folder that holds it")
    return _download(str(source), HUB_PATTERNS if weights else ["*.json"])


def _download(name: str, patterns: list[str]) -> Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UhdError(f"checkpoint {name}: no such folder, and not a Hugging Face hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UhdError(
            f"checkpoint {name}: no such folder, and the hub cannot provide it ({reason}); "
            "check the name, log in with `hf auth login`, or download it and pass the folder"
        ) from None


def read_config(
    folder: Path,
    *,
    config: str | Path | None = None,
    vision_tower: str | Path | None = None,
    layout: str | None = None,
    mask: int | None = None,
) -> ModelConfig:
    """The typed configuration of the checkpoint in `folder`.

    `config` replaces its config.json; `vision_tower` (folder or hub id) its `mm_vision_tower`.
    """
    raw = read_json(Path(config) if config else folder / "config.json")
    tower = _given_tower(folder, vision_tower) if vision_tower else _recorded_tower(folder, raw)
    path = folder / "generation_config.json"
    generating = read_json(path) if path.is_file() else None
    return parse_config(raw, tower, generating, layout=layout, mask=mask)


def _given_tower(folder: Path, tower: str | Path) -> dict:
    """The CLIP config that the user names."""
    for candidate in (Path(tower), folder / tower):
        if candidate.is_dir():
            return read_json(candidate / "config.json")
    return KNOWN_TOWERS.get(str(tower)) or read_json(locate(tower, weights=False) / "config.json")


def _recorded_tower(folder: Path, raw: dict) -> dict:
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
        return read_json(_download(tower, ["*.json"]) / "config.json")
    except UhdError as error:
        raise UhdError(f"config field mm_vision_tower: {error}; pass --vision-tower") from None


class Checkpoint:
    """Lazy access to the tensors of a folder with one or several safetensors files.

    Files are memory-mapped: a tensor is read when asked for and no second copy is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._files = ExitStack()
        self._where: dict[str, object] = {}
        files, listed = self._list_files()
        for path in files:
            try:
                handle = self._files.enter_context(safe_open(path, "pt"))
            except FileNotFoundError:
                raise UhdError(f"{path}: listed in the index but missing; download it again") from None
            except (SafetensorError, OSError) as error:
                raise UhdError(
                    f"{path}: not a readable safetensors file ({error}); download it again"
                ) from None
            for name in handle.keys():  # noqa: SIM118 (a safetensors handle is not a mapping)
                self._where[name] = handle
        absent = sorted(listed - self._where.keys())
        if absent:
            raise UhdError(
                f"checkpoint {self.folder}: the index lists tensors that no file holds, {_some(absent)}; "
                "download it again"
            )

    def _list_files(self) -> tuple[list[Path], set[str]]:
        """The safetensors files, and the tensors that the index lists where there is one."""
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict):
                raise UhdError(f"{index}: field weight_map is missing")
            if any(not isinstance(name, str) or Path(name).name != name for name in shards.values()):
                raise UhdError(f"{index}: field weight_map must hold plain file names")
            return [self.folder / name for name in sorted(set(shards.values()))], set(shards)
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            other = "; convert its .bin files to safetensors first" if list(self.folder.glob("*.bin")) else ""
            raise UhdError(f"checkpoint {self.folder}: holds no safetensors file{other}")
        return files, set()

    def names(self) -> set[str]:
        """Every tensor name in the checkpoint."""
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name`, without reading it."""
        return tuple(self._handle(name).get_slice(name).get_shape())

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Tensor `name`, converted to `dtype` where given. Raises UhdError where it is missing."""
        tensor = self._handle(name).get_tensor(name)
        return tensor if dtype is None else tensor.to(dtype)

    def head(self, tied: bool) -> str:
        """The name of the language model's output matrix; the embedding table's where they are `tied`."""
        return "model.embed_tokens.weight" if tied else "lm_head.weight"

    def _handle(self, name: str) -> Any:
        if name not in self._where:
            raise UhdError(f"checkpoint {self.folder}: tensor {name} is missing")
        return self._where[name]

    def load_into(self, module: torch.nn.Module, prefix: str, dtype: torch.dtype) -> None:
        """Fill `module` (built on the meta device) from the tensors under `prefix`.

        Raises UhdError where a tensor is missing or has another shape.
        """
        for name, parameter in module.named_parameters():
            key = prefix + name
            if key in self._where and self.shape(key) != tuple(parameter.shape):
                raise UhdError(
                    f"tensor {key}: shape {list(self.shape(key))} differs from the expected "
                    f"{list(parameter.shape)}; do config.json and the weights belong together?"
                )
        state = {name: self.tensor(prefix + name, dtype) for name, _ in module.named_parameters()}
        module.load_state_dict(state, assign=True)
        module.requires_grad_(False)
        module.eval()

    def refuse_unknown(self, used: Iterable[str], unused: Callable[[str], bool] = lambda name: False) -> None:
        """Raise UhdError naming tensors that are neither `used` nor known to be unused."""
        unknown = sorted(n for n in self.names() - set(used) if not _UNUSED.search(n) and not unused(n))
        if unknown:
            raise UhdError(
                f"checkpoint {self.folder}: unknown tensors {_some(unknown)}; not a LLaVA-UHD checkpoint?"
            )

    def close(self) -> None:
        """Close the files."""
        self._files.close()


def _some(names: list[str]) -> str:
    """The first of `names`, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
