"""The JBU feature pyramid in PyTorch: a stack of stages, each doubling the feature map."""

import torch
from torch import nn

from uhd_export.model.vit import Geometry
from uhd_export.plugins.jbu.reference import FIXUP, KERNEL, apply_kernels, stage_kernels

GUIDANCE_CHANNELS = 3
RANGE_CHANNELS = 32


def _pointwise(channels_in: int, channels_out: int, hidden: int) -> nn.Sequential:
    """Two 1x1 convolutions. Indices follow the released code, which has a dropout at 2."""
    return nn.Sequential(
        nn.Conv2d(channels_in, hidden, 1), nn.GELU(), nn.Identity(), nn.Conv2d(hidden, channels_out, 1)
    )


def matrices(pointwise: nn.Sequential, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (out, in) and bias of the 1x1 convolution at `index`."""
    convolution = pointwise[index]
    if not isinstance(convolution, nn.Conv2d) or convolution.bias is None:
        raise TypeError(f"module {index} is no convolution with a bias")
    return convolution.weight.flatten(1), convolution.bias


class JbuStage(nn.Module):
    """One learned-range bilateral upsampling (FeatUp's `JBULearnedRange`)."""

    def __init__(self) -> None:
        super().__init__()
        taps = KERNEL * KERNEL
        self.range_temp = nn.Parameter(torch.empty(()))
        self.range_proj = _pointwise(GUIDANCE_CHANNELS, RANGE_CHANNELS, RANGE_CHANNELS)
        self.fixup_proj = _pointwise(taps + GUIDANCE_CHANNELS, taps, taps)
        self.sigma_spatial = nn.Parameter(torch.empty(()))

    def parameters_in_order(self) -> tuple:
        """The arguments of `stage_kernels` after the guidance."""
        return (
            matrices(self.range_proj, 0),
            matrices(self.range_proj, 3),
            self.range_temp,
            self.sigma_spatial,
            matrices(self.fixup_proj, 0),
            matrices(self.fixup_proj, 3),
        )

    def forward(
        self, source: torch.Tensor, image: torch.Tensor, scale: int, geometry: Geometry
    ) -> torch.Tensor:
        """(B, h, w, C) features to (B, 2h, 2w, C); `image` (B, 3, H, W) is the whole crop."""
        pool_y, pool_x = geometry[f"guidance_{scale}x_y"], geometry[f"guidance_{scale}x_x"]
        guidance = torch.einsum("yh,bchw,xw->byxc", pool_y, image.float(), pool_x).to(image.dtype)
        kernels = stage_kernels(guidance, *self.parameters_in_order())
        return apply_kernels(
            source, kernels, geometry[f"upsample_{scale}x_y"], geometry[f"upsample_{scale}x_x"]
        )


class JbuStack(nn.Module):
    """Stages up to the highest level; `x + 0.1 * fixup(x)` on the last scale only."""

    def __init__(self, channels: int, stages: tuple[int, ...]) -> None:
        super().__init__()
        self.scales = stages
        for i in range(len(stages)):
            self.add_module(f"up{i + 1}", JbuStage())
        self.fixup_proj = nn.Sequential(nn.Identity(), nn.Conv2d(channels, channels, 1))

    def raw(self, source: torch.Tensor, image: torch.Tensor, geometry: Geometry) -> dict[int, torch.Tensor]:
        """Every scale's map, (B, s*h, s*w, C) by scale, before the last one's fix-up."""
        maps = {1: source}
        for i, scale in enumerate(self.scales):
            source = maps[scale] = getattr(self, f"up{i + 1}")(source, image, scale, geometry)
        return maps

    def forward(
        self, source: torch.Tensor, image: torch.Tensor, geometry: Geometry
    ) -> dict[int, torch.Tensor]:
        """Every scale's map by scale, 1 included (docs/model.md: JBU pyramid)."""
        maps = self.raw(source, image, geometry)
        last = self.scales[-1]
        weight, bias = matrices(self.fixup_proj, 1)
        maps[last] = maps[last] + FIXUP * nn.functional.linear(maps[last], weight, bias)
        return maps
