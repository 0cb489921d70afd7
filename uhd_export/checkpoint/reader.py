"""The tensors of a checkpoint, read one at a time."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from uhd_export.checkpoint.files import TensorFile, open_files, some
from uhd_export.runtime.errors import UhdError

VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
"""Tensors with a row for each token."""
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
    """Lazy access to the tensors of a folder with one or several files of weights (see `files`).

    Files are memory-mapped: a tensor is read when asked for and no second copy is kept.
    """

    def __init__(self, folder: Path, vocab: int | None = None) -> None:
        """`vocab` cuts the embedding table and the head to as many rows, as the released code does."""
        self.folder, self.vocab = Path(folder), vocab
        self._where: dict[str, TensorFile] = open_files(self.folder)

    def names(self) -> set[str]:
        """Every tensor name in the checkpoint."""
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name`, without reading it."""
        shape = self._file(name).shape(name)
        if self.vocab is None or name not in VOCABULARY or len(shape) != 2:
            return shape
        return (min(shape[0], self.vocab), *shape[1:])

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Tensor `name`, converted to `dtype` where given. Raises UhdError where it is missing."""
        tensor = self.stored(name)
        if name in VOCABULARY and self.vocab is not None:
            tensor = tensor[: self.vocab]
        if not tensor.is_floating_point():
            raise UhdError(
                f"checkpoint {self.folder}: tensor {name} holds {str(tensor.dtype).removeprefix('torch.')} "
                "values, not weights; a tool that config.json does not name quantized it: pass the original"
            )
        return tensor if dtype is None else tensor.to(dtype)

    def stored(self, name: str) -> torch.Tensor:
        """Tensor `name` as it is stored, of whatever type and with all its rows."""
        return self._file(name).tensor(name)

    def head(self, tied: bool) -> str:
        """The name of the language model's output matrix; the embedding table's where they are `tied`."""
        return "model.embed_tokens.weight" if tied else "lm_head.weight"

    def _file(self, name: str) -> TensorFile:
        if name not in self._where:
            raise UhdError(f"checkpoint {self.folder}: tensor {name} is missing{self._remedy(name)}")
        return self._where[name]

    def _remedy(self, name: str) -> str:
        """What a missing tensor tells about the folder, and what to do."""
        if f"{name.removesuffix('.weight')}.qweight" in self._where:
            return (
                ": its layers are quantized, but config.json has no quantization_config; download the folder "
                "again, or pass the original checkpoint"
            )
        if name == "lm_head.weight":
            return "; if the head is the embedding table, set tie_word_embeddings to true in config.json"
        for prefix, part in ((VISION_PREFIX, "vision tower"), (PROJECTOR_PREFIX, "projector")):
            if name.startswith(prefix) and not any(n.startswith(prefix) for n in self._where):
                return (
                    f": it holds no {part} (no tensor under {prefix}); save the whole model, as the official "
                    "checkpoints are"
                )
        return "; do config.json and the weights belong together?"

    def load_into(self, module: torch.nn.Module, prefix: str, dtype: torch.dtype) -> None:
        """Fill `module` (built on the meta device) from the tensors under `prefix`.

        Raises UhdError where a tensor is missing or has another shape.
        """
        for name, parameter in module.named_parameters():
            if prefix + name in self._where:
                self.check_shape(prefix + name, tuple(parameter.shape))
        state = {name: self.tensor(prefix + name, dtype) for name, _ in module.named_parameters()}
        module.load_state_dict(state, assign=True)
        module.requires_grad_(False)
        module.eval()

    def check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        """Raise UhdError where tensor `name` has another shape, or is missing."""
        if self.shape(name) != expected:
            raise UhdError(
                f"tensor {name}: shape {list(self.shape(name))} differs from the expected "
                f"{list(expected)}; do config.json and the weights belong together?"
            )

    def refuse_unknown(self, used: Iterable[str], unused: Callable[[str], bool] = lambda name: False) -> None:
        """Raise UhdError naming tensors that are neither `used` nor known to be unused."""
        unknown = sorted(n for n in self.names() - set(used) if not _UNUSED.search(n) and not unused(n))
        if unknown:
            raise UhdError(
                f"checkpoint {self.folder}: unknown tensors {some(unknown)}; not a LLaVA-UHD checkpoint?"
            )

    def close(self) -> None:
        """Close the files."""
        for file in {id(file): file for file in self._where.values()}.values():
            file.close()
