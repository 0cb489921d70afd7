"""Exact folding of the Hiwin projector: the same function with an order of magnitude less work.

Per level, LayerNorm after a Linear is a linear map times one scalar a pixel:
LN(Wx + b) = g * (A [x; 1]) * s(x) + beta, with A = [W b] minus its mean over the outputs and
s(x) = (|A [x; 1]|^2 / D + eps)^-1/2, where |A [x; 1]| = |R [x; 1]| for the small triangular R of
A = QR. So pixels are scaled by s, pooled in vision channels, and projected only after the attention
has mixed them. Queries are parameters: each becomes one vector a window, head and query set. Weights
are folded in float64. Derivation: docs/folding.md.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from uhd_export.model.jbu import JbuStack
from uhd_export.model.projector import LN_EPS, QUERY_SETS, HiwinProjector
from uhd_export.model.vit import Geometry
from uhd_export.plugins.jbu.reference import FIXUP
from uhd_export.plugins.window_attention.reference import Level, position_scores, window_attention


@dataclass(frozen=True)
class FoldedLevel:
    """One level's folded weights; letters as in uhd_export.plugins.window_attention.reference."""

    # (C, R), R <= C: features to the vector whose squared length, with `norm_rest`, is the LayerNorm's.
    norm_weight: torch.Tensor
    norm_bias: torch.Tensor  # (R,)
    norm_rest: float
    query: torch.Tensor  # (N, C, Q)
    query_scale: torch.Tensor  # (N, Q)
    query_mass: torch.Tensor  # (N, Q)


@dataclass(frozen=True)
class FoldedProjector:
    """All folded weights of a Hiwin projector."""

    scales: tuple[int, ...]
    hidden: int
    levels: tuple[FoldedLevel, ...]
    query_position: torch.Tensor  # (N, side^2, Q)
    value: torch.Tensor  # (levels, heads, C, head size)
    value_moments: torch.Tensor  # (levels, heads, 2, head size): of the mixed scale and mass
    value_bias: torch.Tensor  # (D,)
    out_weight: torch.Tensor  # (D, D), in x out
    out_bias: torch.Tensor
    cat_weight: torch.Tensor  # (4D, D), in x out, ln_proj's affine folded in
    cat_bias: torch.Tensor
    proj_weight: torch.Tensor  # (D, D), in x out, ln_post's affine folded in
    proj_bias: torch.Tensor


def fold(projector: HiwinProjector) -> FoldedProjector:
    """Fold the weights of `projector`; the result holds float32 tensors."""
    wide = {name: p.detach().double() for name, p in projector.named_parameters()}
    heads, d = projector.attn.heads, len(projector.proj)
    w_q, w_k, w_v = wide["attn.in_proj_weight"].chunk(3)
    b_q, _, b_v = wide["attn.in_proj_bias"].chunk(3)  # the key bias cancels in the softmax
    gain, shift = wide["ln_kv.weight"], wide["ln_kv.bias"]
    maps = {scale: _centred(projector, wide, scale) for scale in projector.levels}
    embeddings = {scale: wide[f"feature_{scale}x_embedding"].reshape(-1) for scale in projector.levels}

    queries = [
        F.layer_norm(wide[f"query_{i}"], (d,), wide["ln_q.weight"], wide["ln_q.bias"], LN_EPS)
        + wide["pos_embed"]
        for i in QUERY_SETS
    ]
    query = F.linear(torch.stack(queries, 1), w_q, b_q).unflatten(-1, (heads, -1))  # (N, sets, heads, size)
    query = query * query.shape[-1] ** -0.5

    position = []
    by_level: dict[int, list[torch.Tensor]] = {scale: [] for scale in projector.levels}
    for head, key_weight in enumerate(w_k.unflatten(0, (heads, -1))):
        key_query = query[:, :, head] @ key_weight  # (N, sets, D): what a key of D channels is multiplied by
        position.append(key_query @ wide["pos_embed"].T)
        for scale in projector.levels:
            folded = (key_query * gain) @ maps[scale]  # (N, sets, C + 1)
            mass = key_query @ (shift + embeddings[scale])
            by_level[scale].append(torch.cat([folded, mass[..., None]], -1).float())

    value_weight = (w_v * gain).unflatten(0, (heads, -1))  # (heads, size, D)
    value_mass = F.linear(shift, w_v).unflatten(0, (heads, -1))
    levels, values, moments = [], [], []
    for scale in projector.levels:
        parts = torch.cat(by_level[scale], 1)  # (N, Q, C + 2), the head as the slow axis
        value = (value_weight @ maps[scale]).transpose(1, 2)  # (heads, C + 1, size)
        triangle = torch.linalg.qr(maps[scale], mode="r").R
        # Only its last column, the bias', reaches below row C.
        rest, triangle = triangle[maps[scale].shape[1] - 1 :, -1], triangle[: maps[scale].shape[1] - 1]
        values.append(value[:, :-1].float())
        moments.append(torch.stack([value[:, -1], value_mass], 1).float())
        levels.append(
            FoldedLevel(
                norm_weight=triangle[:, :-1].T.float().contiguous(),
                norm_bias=triangle[:, -1].float(),
                norm_rest=float(rest.square().sum()),
                query=parts[..., :-2].transpose(1, 2).contiguous(),
                query_scale=parts[..., -2].contiguous(),
                query_mass=parts[..., -1].contiguous(),
            )
        )
    sets = len(QUERY_SETS)
    cat, proj = wide["cat_proj.weight"], wide["proj"]
    return FoldedProjector(
        scales=projector.levels,
        hidden=d,
        levels=tuple(levels),
        query_position=torch.cat(position, 1).transpose(1, 2).float().contiguous(),
        value=torch.stack(values),
        value_moments=torch.stack(moments),
        value_bias=b_v.float(),
        out_weight=wide["attn.out_proj.weight"].T.float().contiguous(),
        out_bias=wide["attn.out_proj.bias"].float(),
        cat_weight=(cat * wide["ln_proj.weight"].repeat(sets)).T.float().contiguous(),
        cat_bias=(wide["cat_proj.bias"] + cat @ wide["ln_proj.bias"].repeat(sets)).float(),
        proj_weight=(wide["ln_post.weight"][:, None] * proj).float(),
        proj_bias=(wide["ln_post.bias"] @ proj).float(),
    )


def _centred(projector: HiwinProjector, wide: dict[str, torch.Tensor], scale: int) -> torch.Tensor:
    """A = [W b] minus its mean over the outputs, (D, C + 1); JBU's last fix-up folded in."""
    weight, bias = wide[f"features_{scale}x_projector.weight"], wide[f"features_{scale}x_projector.bias"]
    # Of the JBU's pyramid alone; others have no fix-up.
    pyramid = projector.upsampler.upsampler if scale > 1 else None
    if isinstance(pyramid, JbuStack) and scale == pyramid.scales[-1]:
        fixup = wide["upsampler.upsampler.fixup_proj.1.weight"].flatten(1)
        bias = bias + FIXUP * (weight @ wide["upsampler.upsampler.fixup_proj.1.bias"])
        weight = weight + FIXUP * (weight @ fixup)
    augmented = torch.cat([weight, bias[:, None]], 1)
    return augmented - augmented.mean(0)


def pixel_scale(features: torch.Tensor, level: FoldedLevel, hidden: int) -> torch.Tensor:
    """The LayerNorm's scalar s of each pixel, (B, H, W), from (B, H, W, C) features; summed in float32."""
    length = (features @ level.norm_weight + level.norm_bias).float().square().sum(-1)
    return torch.rsqrt(length / hidden + (level.norm_rest / hidden + LN_EPS)).to(features.dtype)


def folded_tokens(
    folded: FoldedProjector,
    maps: dict[int, torch.Tensor],
    geometry: Geometry,
    attend: Callable[..., torch.Tensor] = window_attention,
) -> torch.Tensor:
    """(B, N, D) tokens from the raw JBU maps (before the last fix-up).

    In plain PyTorch, or with a kernel's `attend` in place of the reference.
    """
    inputs = [
        Level(
            maps[scale],
            pixel_scale(maps[scale], level, folded.hidden),
            geometry[f"roi_{scale}x_y"],
            geometry[f"roi_{scale}x_x"],
            level.query,
            level.query_scale,
            level.query_mass,
        )
        for scale, level in zip(folded.scales, folded.levels, strict=True)
    ]
    cells = [
        (geometry[f"window_position_{scale}x_y"], geometry[f"window_position_{scale}x_x"])
        for scale in folded.scales
    ]
    position = position_scores(cells, folded.query_position)
    attended = attend(inputs, position, folded.value, folded.value_moments) + folded.value_bias
    x = F.layer_norm(attended @ folded.out_weight + folded.out_bias, (folded.hidden,), eps=LN_EPS)
    x = F.layer_norm(x.flatten(-2) @ folded.cat_weight + folded.cat_bias, (folded.hidden,), eps=LN_EPS)
    return x @ folded.proj_weight + folded.proj_bias
