"""One stage of joint bilateral upsampling in plain PyTorch, as the released code computes it."""

import torch
from torch.nn import functional as F

KERNEL = 7
RADIUS = KERNEL // 2
FIXUP = 0.1


def stage_kernels(
    guidance: torch.Tensor,
    range_in: tuple[torch.Tensor, torch.Tensor],
    range_out: tuple[torch.Tensor, torch.Tensor],
    range_temp: torch.Tensor,
    sigma_spatial: torch.Tensor,
    fixup_in: tuple[torch.Tensor, torch.Tensor],
    fixup_out: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """The 49 weights of every output pixel, (B, H, W, 49), taps row by row.

    `guidance` is (B, H, W, 3); the weight pairs are (out, in) matrices and biases of the 1x1
    convolutions. Source: `JBULearnedRange` of FeatUp as released (docs/model.md: JBU pyramid).
    """
    features = F.linear(F.gelu(F.linear(guidance, *range_in)), *range_out)
    padded = F.pad(features.permute(0, 3, 1, 2), [RADIUS] * 4, mode="reflect")
    taps = padded.unfold(2, KERNEL, 1).unfold(3, KERNEL, 1)  # (B, C, H, W, 7, 7)
    similarity = torch.einsum("bhwc,bchwij->bhwij", features, taps).flatten(-2)
    temperature = range_temp.exp().clamp(1e-4, 1e4)
    near = torch.softmax(temperature * similarity, -1)
    kernels = near * spatial_kernel(sigma_spatial)
    kernels = kernels / kernels.sum(-1, keepdim=True).clamp(1e-7)
    correction = F.linear(F.gelu(F.linear(torch.cat([kernels, guidance], -1), *fixup_in)), *fixup_out)
    return kernels + FIXUP * correction


def spatial_kernel(sigma: torch.Tensor) -> torch.Tensor:
    """exp(-d^2 / (2 sigma^2)) on the 7x7 grid over [-1, 1], as (49,)."""
    line = torch.linspace(-1, 1, KERNEL, device=sigma.device).to(sigma.dtype)
    distance = line[:, None] ** 2 + line[None, :] ** 2
    return torch.exp(-distance / (2 * sigma**2)).flatten()


def apply_kernels(
    source: torch.Tensor, kernels: torch.Tensor, upsample_y: torch.Tensor, upsample_x: torch.Tensor
) -> torch.Tensor:
    """Upsample (B, h, w, C) to (B, H, W, C) and weight each 7x7 neighbourhood by `kernels`.

    `upsample_y` (H + 6, h) and `upsample_x` (W + 6, w) hold bicubic doubling and reflect padding.
    """
    up = torch.einsum("yh,bhwc,xw->byxc", upsample_y, source.float(), upsample_x).to(source.dtype)
    height, width = kernels.shape[1:3]
    out = torch.zeros_like(up[:, :height, :width])
    for tap in range(KERNEL * KERNEL):
        dy, dx = divmod(tap, KERNEL)
        out += kernels[..., tap : tap + 1] * up[:, dy : dy + height, dx : dx + width]
    return out
