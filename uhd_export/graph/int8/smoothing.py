"""Moving outliers from activations into weights, exactly (SmoothQuant, arXiv 2211.10438).

What a product takes is divided by a factor a channel, and the rows of its weight are multiplied with it.
The division is folded into what is linear before the product: a LayerNorm's gain and shift, or the rows of
the value projection before the attention's output projection. Factors are powers of two: nothing is rounded.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from uhd_export.checkpoint.reader import VISION_PREFIX, Checkpoint
from uhd_export.runtime.config import VisionConfig


@dataclass(frozen=True)
class Group:
    """A product that can be smoothed: outputs of `before` are divided; `after` are the product's linears."""

    product: str
    before: str
    after: tuple[str, ...]


def groups(config: VisionConfig) -> list[Group]:
    """What can be smoothed in the ViT; nothing takes fc2's factors, whose input is an activation's output."""
    found = []
    for i in range(config.layers):
        layer = f"{VISION_PREFIX}encoder.layers.{i}."
        short, attention = f"encoder.layers.{i}.", f"{layer}self_attn."
        for before, names in (
            (f"{layer}layer_norm1", [f"self_attn.{part}_proj" for part in "qkv"]),
            (f"{attention}v_proj", ["self_attn.out_proj"]),
            (f"{layer}layer_norm2", ["mlp.fc1"]),
        ):
            product = VISION_PREFIX + "+".join(short + name for name in names)
            found.append(Group(product, before, tuple(layer + name for name in names)))
    return found


def factors(activations: np.ndarray, weight: np.ndarray, strength: float) -> np.ndarray:
    """Powers of two (K,) near |x|^strength / |W|^(1 - strength); `activations` are the largest |x|."""
    rows = np.abs(weight).max(1)
    usable = (activations > 0) & (rows > 0)
    wanted = np.ones_like(rows)
    wanted[usable] = activations[usable] ** strength / rows[usable] ** (1 - strength)
    logs = np.log2(wanted)
    # Centred, since a factor common to all channels changes nothing.
    centred = logs - np.median(logs[usable] if usable.any() else logs)
    return np.where(usable, np.exp2(np.rint(centred)), 1.0).astype(np.float32)


class SmoothedView(Checkpoint):
    """`base` with factors folded in: the same function. The caller closes `base`."""

    def __init__(self, base: Checkpoint, chosen: Mapping[Group, np.ndarray]) -> None:
        self.folder, self.vocab, self._base, self._where = base.folder, base.vocab, base, base._where
        self._divided: dict[str, torch.Tensor] = {}
        self._multiplied: dict[str, torch.Tensor] = {}
        for group, factor in chosen.items():
            values = torch.from_numpy(factor.astype(np.float32))
            self._divided |= {f"{group.before}.weight": values, f"{group.before}.bias": values}
            self._multiplied |= {f"{name}.weight": values for name in group.after}

    def names(self) -> set[str]:
        """As in the base."""
        return self._base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """As in the base."""
        return self._base.shape(name)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Tensor `name`, smoothed in float32 where factors go into it."""
        if name not in self._divided and name not in self._multiplied:
            return self._base.tensor(name, dtype)
        tensor = self._base.tensor(name, torch.float32)
        if name in self._divided:
            factor = self._divided[name]
            tensor = tensor / (factor[:, None] if tensor.ndim == 2 else factor)
        if name in self._multiplied:
            tensor = tensor * self._multiplied[name]
        return tensor if dtype is None else tensor.to(dtype)

    def close(self) -> None:
        """Nothing: the base stays open."""
