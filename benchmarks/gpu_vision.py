"""The vision path on a GPU in PyTorch: the released computation, and ours, folded with kernels.

Both run on the same random weights; each has the stages `vit`, `jbu` and `hiwin`, so that they can be timed
apart, and `encode` for all of them. `vit_products` is what the ViT must multiply at least.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from uhd_export.checkpoint.config import read_config
from uhd_export.checkpoint.options import SourceOptions
from uhd_export.checkpoint.reader import PROJECTOR_PREFIX, VISION_PREFIX, Checkpoint
from uhd_export.model.folding import FoldedProjector, fold, folded_tokens
from uhd_export.model.projector import HiwinProjector
from uhd_export.model.vit import VisionTower
from uhd_export.plugins.jbu import torch_op as _jbu  # noqa: F401 (registers the op)
from uhd_export.plugins.window_attention import torch_op as _window  # noqa: F401
from uhd_export.plugins.window_attention.reference import Level
from uhd_export.runtime.image.geometry import crop_geometry

Maps = dict[int, torch.Tensor]
Geometry = dict[str, torch.Tensor]
Shape = tuple[int, int, int]


class Batch:
    """Equal crops with random pixels, and their geometry, on the device."""

    def __init__(
        self, shape: tuple[int, int, int], scales: list[int], device: str, dtype: torch.dtype
    ) -> None:
        self.shape = shape
        count, rows, cols = shape
        generator = torch.Generator().manual_seed(rows)
        self.pixels = torch.randn(count, 3, rows * 14, cols * 14, generator=generator).to(device, dtype)
        arrays = crop_geometry(rows, cols, levels=scales)
        self.exact = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        self.geometry = {name: matrix.to(dtype) for name, matrix in self.exact.items()}


class Released:
    """What the released code executes, in eager PyTorch."""

    def __init__(self, folder: Path, device: str, dtype: torch.dtype, **files: Path) -> None:
        self.config = read_config(folder, SourceOptions(**files))
        projector = self.config.projector
        self.scales = sorted({1, *projector.levels, *projector.stages})
        self.dtype, self.device = dtype, device
        with torch.device("meta"):
            self.tower, self.projector = VisionTower(self.config.vision), HiwinProjector(projector)
        checkpoint = Checkpoint(folder)
        checkpoint.load_into(self.tower, VISION_PREFIX, torch.float32)
        checkpoint.load_into(self.projector, PROJECTOR_PREFIX, torch.float32)
        checkpoint.close()
        self._prepare()
        self.tower, self.projector = self.tower.to(device, dtype), self.projector.to(device, dtype)

    def _prepare(self) -> None:
        """What the weights are needed for in float32."""

    def batch(self, shape: Shape) -> Batch:
        """Inputs for crops of `shape`: how many, rows, columns of patches."""
        return Batch(shape, self.scales, self.device, self.dtype)

    def vit(self, batch: Batch) -> torch.Tensor:
        """(B, h, w, C) features."""
        return self.tower(batch.pixels, batch.exact)

    def jbu(self, features: torch.Tensor, batch: Batch) -> Maps:
        """Maps by scale."""
        return self.projector.pyramid(features, batch.pixels, batch.exact)

    def hiwin(self, maps: Maps, batch: Batch) -> torch.Tensor:
        """(B, N, D) tokens."""
        return self.projector.attend(maps, batch.exact)

    def encode(self, batch: Batch) -> torch.Tensor:
        """All stages."""
        return self.hiwin(self.jbu(self.vit(batch), batch), batch)


class Compiled(Released):
    """The released computation under torch.compile, each stage a graph of its own."""

    def _prepare(self) -> None:
        for name in ("vit", "jbu", "hiwin"):
            setattr(self, name, torch.compile(getattr(self, name), dynamic=False))


class Ours(Released):
    """Folded, with the kernels of JBU and window attention."""

    folded: FoldedProjector

    def _prepare(self) -> None:
        folded = fold(self.projector.to(self.device))
        levels = tuple(_convert(level, self.device, self.dtype) for level in folded.levels)
        self.folded = dataclasses.replace(_convert(folded, self.device, self.dtype), levels=levels)

    def jbu(self, features: torch.Tensor, batch: Batch) -> Maps:
        """Raw maps: the last fix-up is folded into what follows."""
        stack, maps = self.projector.upsampler.upsampler, {1: features}
        for i, scale in enumerate(stack.scales):
            stage = getattr(stack, f"up{i + 1}")
            y, x = (batch.geometry[f"guidance_{scale}x_{axis}"] for axis in "yx")
            guidance = (y @ batch.pixels @ x.T).permute(0, 2, 3, 1).contiguous()
            weights = [
                value
                for part in (stage.range_proj, stage.fixup_proj)
                for index in (0, 3)
                for value in (part[index].weight.flatten(1).T.contiguous(), part[index].bias)
            ]
            upsample = (batch.geometry[f"upsample_{scale}x_{axis}"] for axis in "yx")
            scalars = stage.range_temp, stage.sigma_spatial
            inputs = (features.contiguous(), guidance, *weights[:4], *scalars, *weights[4:], *upsample)
            features = maps[scale] = torch.ops.uhd.jbu(*inputs)
        return maps

    def hiwin(self, maps: Maps, batch: Batch) -> torch.Tensor:
        """(B, N, D) tokens by the folded weights."""
        return folded_tokens(self.folded, maps, batch.geometry, _attend)


def _attend(levels: list[Level], *shared: torch.Tensor) -> torch.Tensor:
    return torch.ops.uhd.window_attention(
        *shared, [tensor.contiguous() for level in levels for tensor in level]
    )


def _convert(weights: object, device: str, dtype: torch.dtype) -> object:
    """A dataclass of tensors with all of them converted."""
    fields = {field.name: getattr(weights, field.name) for field in dataclasses.fields(weights)}
    moved = {n: v.to(device, dtype) for n, v in fields.items() if isinstance(v, torch.Tensor)}
    return dataclasses.replace(weights, **moved)


def vit_products(model: Released, batch: Batch) -> Callable[[], object]:
    """The ViT's matrix products alone, at the same shapes: weights times activations, and attention."""
    vision, (count, rows, cols) = model.config.vision, batch.shape
    positions, size = 1 + rows * cols, vision.hidden // vision.heads

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=model.device, dtype=model.dtype)

    x, wide = random(count * positions, vision.hidden), random(count * positions, vision.intermediate)
    inner = [random(vision.hidden, n) for n in (3 * vision.hidden, vision.hidden, vision.intermediate)]
    down = random(vision.intermediate, vision.hidden)
    q, k, v = (random(count, vision.heads, positions, size) for _ in range(3))
    patch = random(vision.hidden, 3, vision.patch, vision.patch)

    def run() -> None:
        F.conv2d(batch.pixels, patch, stride=vision.patch)
        for _ in range(vision.layers):
            for weight in inner:
                x @ weight
            F.scaled_dot_product_attention(q, k, v)
            wide @ down

    return run
