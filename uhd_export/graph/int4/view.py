"""The weights that a bundle is held to: a checkpoint as rounding changes it."""

import torch

from uhd_export.checkpoint.int4.linears import LM_HEAD, head_group, linear_shapes
from uhd_export.checkpoint.int4.weight import round_to_nearest
from uhd_export.checkpoint.reader import Checkpoint
from uhd_export.runtime.bundle.manifest import Quantization
from uhd_export.runtime.config import LanguageConfig

EMBED_TOKENS = "model.embed_tokens.weight"
_HEAD = f"{LM_HEAD}.weight"


class RoundedView(Checkpoint):
    """`base` with the values that a bundle rounds in place of its own. The caller closes `base`.

    A tied head that is rounded is a tensor of its own. Beside int4 layers the embedding table is float16.
    """

    def __init__(self, base: Checkpoint, config: LanguageConfig, quantization: Quantization) -> None:
        self.folder, self._base, self._where = base.folder, base, base._where
        self._symmetric = quantization.symmetric
        self._rounded: dict[str, tuple[int, int]] = {}
        self._head = base.head(config.tied)
        self._half = quantization.method is not None
        if quantization.method == "rtn":
            self._rounded = {f"{name}.weight": (quantization.group, 4) for name in linear_shapes(config)}
        bits = quantization.head_bits
        if bits is not None:
            self._rounded[_HEAD] = head_group(config), bits

    def names(self) -> set[str]:
        """As in the base."""
        return self._base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """As in the base."""
        return self._base.shape(name)

    def head(self, tied: bool) -> str:
        """As in the base, unless it is rounded."""
        return _HEAD if _HEAD in self._rounded else self._base.head(tied)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Tensor `name`, rounded where the bundle's is."""
        if name == EMBED_TOKENS and self._half:
            return self._base.tensor(name).half().to(dtype or torch.float32)
        if name not in self._rounded:
            return self._base.tensor(name, dtype)
        group, bits = self._rounded[name]
        dense = self._base.tensor(self._head if name == _HEAD else name, torch.float32).numpy()
        rounded = round_to_nearest(dense, group, bits=bits, symmetric=name == _HEAD or self._symmetric)
        return torch.from_numpy(rounded.dequantize()).to(dtype or torch.float32)

    def close(self) -> None:
        """Nothing: the base stays open."""


def as_stored(base: Checkpoint, config: LanguageConfig, quantization: Quantization | None) -> Checkpoint:
    """`base` with the weights that a bundle of `quantization` stores."""
    return base if quantization is None else RoundedView(base, config, quantization)
