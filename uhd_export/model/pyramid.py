"""Feature pyramids to hold the JBU against (the paper's Table 3): bilinear resizing, transposed convolutions.

No released checkpoint has one. Their modules have the JBU stack's interface, and neither a last fix-up.
"""

import torch
from torch import nn

from uhd_export.model.vit import Geometry


class BilinearPyramid(nn.Module):
    """The first level resized to every other; nothing is learned, and the image is not looked at."""

    def __init__(self, channels: int, stages: tuple[int, ...]) -> None:
        super().__init__()
        self.scales = stages

    def raw(self, source: torch.Tensor, image: torch.Tensor, geometry: Geometry) -> dict[int, torch.Tensor]:
        """Every scale's map in use, (B, s*h, s*w, C) by scale."""
        maps = {1: source}
        for scale in self.scales:
            if f"upsample_{scale}x_y" in geometry:
                up_y, up_x = geometry[f"upsample_{scale}x_y"], geometry[f"upsample_{scale}x_x"]
                maps[scale] = torch.einsum("yh,bhwc,xw->byxc", up_y, source.float(), up_x).to(source.dtype)
        return maps

    forward = raw


class DeconvolutionPyramid(nn.Module):
    """A transposed convolution a stage, kernel and stride 2: every pixel becomes four of its own."""

    def __init__(self, channels: int, stages: tuple[int, ...]) -> None:
        super().__init__()
        self.scales = stages
        for i in range(len(stages)):
            self.add_module(f"up{i + 1}", nn.ConvTranspose2d(channels, channels, 2, stride=2))

    def raw(self, source: torch.Tensor, image: torch.Tensor, geometry: Geometry) -> dict[int, torch.Tensor]:
        """Every scale's map, (B, s*h, s*w, C) by scale."""
        maps = {1: source}
        for i, scale in enumerate(self.scales):
            source = getattr(self, f"up{i + 1}")(source.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            maps[scale] = source
        return maps

    forward = raw
