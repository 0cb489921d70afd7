"""The vision path for training: the released computation, rearranged to be cheap on a CPU.

Same parameters and same results as `uhd_export.model.vit` and `uhd_export.model.projector`; only the order of
the linear steps differs.
"""

import torch
from torch.nn import functional as F

from uhd_export.model.jbu import JbuStack, JbuStage
from uhd_export.model.projector import QUERY_SETS, HiwinProjector
from uhd_export.model.vit import Attention, Geometry, VisionTower
from uhd_export.plugins.jbu.reference import FIXUP, KERNEL, RADIUS, spatial_kernel

STRIP = 8  # rows of a feature map upsampled at a time


def vit_features(tower: VisionTower, pixels: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """`VisionTower.forward` with attention as plain matrix products, (B, h, w, C).

    On a CPU the backward pass of torch's fused attention takes several times as long.
    """
    x = tower.pre_layrnorm(tower.embeddings(pixels, geometry))
    for layer in tower.encoder.layers:
        x = x + _attention(layer.self_attn, layer.layer_norm1(x))
        x = x + layer.mlp(layer.layer_norm2(x))
    return x[:, 1:].unflatten(1, (len(geometry["position_y"]), len(geometry["position_x"])))


def _attention(attention: Attention, x: torch.Tensor) -> torch.Tensor:
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    weight, bias = torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts])
    q, k, v = F.linear(x, weight, bias).unflatten(-1, (3, attention.heads, -1)).permute(2, 0, 3, 1, 4)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    # Kept in the matrix products' type: autocast would widen the largest tensor of the step.
    with torch.autocast("cpu", enabled=False):
        near = scores.softmax(-1)
    return attention.out_proj((near @ v).transpose(1, 2).flatten(2))


def pool(features: torch.Tensor, roi_y: torch.Tensor, roi_x: torch.Tensor) -> torch.Tensor:
    """`pool_windows` as two matrix products, first along rows: (B, H, W, C) to (B, N, K, C)."""
    side, bins_y, bins_x = *roi_y.shape[:2], roi_x.shape[1]
    rows = torch.matmul(roi_y.flatten(0, 1), features.flatten(2)).unflatten(2, features.shape[2:])
    both = torch.matmul(roi_x.flatten(0, 1), rows)  # (B, side*bins_y, side*bins_x, C)
    both = both.unflatten(2, (side, bins_x)).unflatten(1, (side, bins_y))
    return both.transpose(2, 3).flatten(1, 2).flatten(2, 3)


def _matmul_pool(y: torch.Tensor, maps: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """y @ maps @ x^T of (B, h, w, C) maps along rows and columns."""
    rows = torch.matmul(y, maps.flatten(2)).unflatten(2, maps.shape[2:])
    return torch.matmul(x, rows)


def upsample(
    stage: JbuStage, source: torch.Tensor, image: torch.Tensor, scale: int, geometry: Geometry
) -> torch.Tensor:
    """`JbuStage.forward` in strips that stay in the cache; call it without gradients."""
    guidance = _matmul_pool(
        geometry[f"guidance_{scale}x_y"], image.permute(0, 2, 3, 1), geometry[f"guidance_{scale}x_x"]
    )
    range_in, range_out, temperature, sigma, fixup_in, fixup_out = stage.parameters_in_order()
    features = F.linear(F.gelu(F.linear(guidance, *range_in)), *range_out)
    padded = (
        F.pad(features.permute(0, 3, 1, 2), [RADIUS] * 4, mode="reflect").permute(0, 2, 3, 1).contiguous()
    )
    up = _matmul_pool(geometry[f"upsample_{scale}x_y"], source, geometry[f"upsample_{scale}x_x"])
    spatial, heat = spatial_kernel(sigma), temperature.exp().clamp(1e-4, 1e4)
    batch, height, width = guidance.shape[:3]
    out = torch.zeros(batch, height, width, source.shape[-1])
    taps = [divmod(tap, KERNEL) for tap in range(KERNEL * KERNEL)]
    for b in range(batch):
        for top in range(0, height, STRIP):
            rows = min(STRIP, height - top)
            centre, target = features[b, top : top + rows], out[b, top : top + rows]
            similar = torch.stack(
                [(centre * padded[b, top + y : top + y + rows, x : x + width]).sum(-1) for y, x in taps], -1
            )
            kernels = torch.softmax(heat * similar, -1) * spatial
            kernels = kernels / kernels.sum(-1, keepdim=True).clamp(1e-7)
            both = torch.cat([kernels, guidance[b, top : top + rows]], -1)
            kernels = kernels + FIXUP * F.linear(F.gelu(F.linear(both, *fixup_in)), *fixup_out)
            for tap, (y, x) in enumerate(taps):
                target.addcmul_(kernels[..., tap : tap + 1], up[b, top + y : top + y + rows, x : x + width])
    return out


@torch.no_grad()
def pyramid(
    stack: JbuStack, source: torch.Tensor, image: torch.Tensor, geometry: Geometry
) -> dict[int, torch.Tensor]:
    """Every scale's raw map of (B, h, w, C) features in float32, as `JbuStack.raw`, no gradients."""
    maps = {1: source.float()}
    with torch.autocast("cpu", enabled=False):
        for i, scale in enumerate(stack.scales):
            stage = getattr(stack, f"up{i + 1}")
            maps[scale] = upsample(stage, maps[scale // 2], image, scale, geometry)
    return maps


def window_tokens(
    projector: HiwinProjector, maps: dict[int, torch.Tensor], geometry: Geometry, levels: tuple[int, ...]
) -> torch.Tensor:
    """(B, N, D) tokens from the pyramid's `maps`, with the key/value projections folded away.

    Scores are q W_k . key (b_k cancels in the softmax), and W_v is applied after mixing.
    Written for one attention head, which D = 128 has.
    """
    if projector.attn.heads != 1:
        raise ValueError("window_tokens is written for one attention head (hidden size 128)")
    table = projector.pos_embed.unflatten(0, (projector.side, projector.side))
    keys, values = [], []
    for scale in levels:
        roi_y, roi_x = geometry[f"roi_{scale}x_y"], geometry[f"roi_{scale}x_x"]
        level = getattr(projector, f"features_{scale}x_projector")(maps[scale])
        value = pool(projector.ln_kv(level), roi_y, roi_x)
        weight = torch.einsum("ip,jq->ijpq", roi_y.sum(-1), roi_x.sum(-1)).flatten(0, 1).flatten(1)
        embedding = getattr(projector, f"feature_{scale}x_embedding").reshape(-1)
        position = pool(
            table[None], geometry[f"window_position_{scale}x_y"], geometry[f"window_position_{scale}x_x"]
        )
        keys.append(value + position + weight[..., None] * embedding)
        values.append(value)
    key, value = torch.cat(keys, 2), torch.cat(values, 2)
    (w_q, w_k, w_v), (b_q, _, b_v) = (
        projector.attn.in_proj_weight.chunk(3),
        projector.attn.in_proj_bias.chunk(3),
    )
    queries = torch.stack([getattr(projector, f"query_{i}") for i in QUERY_SETS], 1)  # (N, 4, D)
    query = F.linear(projector.ln_q(queries) + projector.pos_embed[:, None], w_q, b_q)
    scores = torch.einsum("nsd,bnkd->bnsk", (query * query.shape[-1] ** -0.5) @ w_k, key)
    mixed = scores.softmax(-1) @ value  # (B, N, 4, D)
    out = projector.ln_proj(projector.attn.out_proj(F.linear(mixed, w_v, b_v)))
    return projector.ln_post(projector.cat_proj(out.flatten(2))) @ projector.proj
