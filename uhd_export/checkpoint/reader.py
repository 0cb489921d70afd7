"""The tensors of a checkpoint, read one at a time."""

import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from uhd_export.checkpoint.fields import read_json
from uhd_export.runtime.errors import UhdError

VISION_PREFIX = "model.vision_tower.vision_tower.vision_model."
PROJECTOR_PREFIX = "model.mm_projector."
# Tensors that official checkpoints hold and some configuration does not use: the second CLIP, levels
# and stages that the mask leaves out, the other projector release's parts.
_UNUSED = re.compile(
    r"mm_projector\.(query(_\d)?|pos_embed|proj|(kv|cat)_proj\.\w+|ln_(q|kv|proj|post)\.\w+|attn\..*"
    r"|upsampler\.(model|upsampler)\..*|features_\dx_projector\.\w+|feature_\dx_embedding)$"
    r"|vision_model\.(post_layernorm\..*|embeddings\.position_ids)$"
    r"|rotary_emb\.inv_freq$|model\.image_newline$"
)


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
