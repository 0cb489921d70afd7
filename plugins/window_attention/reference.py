"""Window attention over pooled rows in plain PyTorch: what the fused kernels must equal.

The Hiwin projector, folded (docs: exact folding), attends in each window from `Q = heads * sets`
queries to the pooled rows of all levels. Letters in shapes: B crops, N = side^2 windows, K bins of a
window at one level, C vision channels, Q queries with the head as the slow axis.
"""

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import torch

T = TypeVar("T")


class Level(NamedTuple, Generic[T]):
    """One level's inputs: tensors here, values of a graph where ONNX is written."""

    features: T  # (B, H, W, C)
    scale: T  # (B, H, W): the LayerNorm's scalar of each pixel
    roi_y: T  # (side, bins_y, H)
    roi_x: T  # (side, bins_x, W)
    query: T  # (N, C, Q): folded queries against scaled features
    query_scale: T  # (N, Q): against the pooled scale
    query_mass: T  # (N, Q): against the pooled constant one


def pool(features: torch.Tensor, roi_y: torch.Tensor, roi_x: torch.Tensor) -> torch.Tensor:
    """RoIAlign of (B, H, W, C) to (N, B, K, C)."""
    pooled = torch.einsum("ipy,byxc,jqx->ijbpqc", roi_y, features, roi_x)
    return pooled.flatten(0, 1).flatten(2, 3)


def outer(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(side, bins_y, A) and (side, bins_x, B) to (N, K, A * B)."""
    return torch.einsum("ipa,jqb->ijpqab", y, x).flatten(4, 5).flatten(2, 3).flatten(0, 1)


def position_scores(
    cells: Sequence[tuple[torch.Tensor, torch.Tensor]], query_position: torch.Tensor
) -> torch.Tensor:
    """Scores (N, K of all levels, Q) of the pooled position table, from each level's (side, bins, side) pair.

    `query_position` (N, side^2, Q) scores the table's cells. The same for all crops of a shape.
    """
    return torch.cat([outer(y, x) for y, x in cells], 1) @ query_position


def window_attention(
    levels: Sequence[Level[torch.Tensor]],
    position: torch.Tensor,
    value: torch.Tensor,
    value_moments: torch.Tensor,
) -> torch.Tensor:
    """Attend in every window over all levels' pooled rows, (B, N, sets, heads * size); one softmax for all.

    The score of a row is query . pooled(scale * features) + query_scale * pooled(scale) + query_mass * mass +
    position (N, K of all levels, Q), mass being the pooled constant one (1 except where samples fall outside
    the map). What a head mixes is multiplied by its `value` (levels, heads, C, size), the mixed scale and
    mass by `value_moments` (levels, heads, 2, size).
    Source: paper section 3.3, equations of the folding in `uhd_export.model.folding`.
    """
    rows, extras, scores = [], [], []
    for level in levels:
        pooled = pool(level.features * level.scale[..., None], level.roi_y, level.roi_x)
        scale = pool(level.scale[..., None], level.roi_y, level.roi_x)[..., 0]
        mass = outer(level.roi_y.sum(-1, keepdim=True), level.roi_x.sum(-1, keepdim=True))[..., 0]
        mass = mass[:, None].expand_as(scale)
        score = torch.einsum("nbkc,ncq->nbkq", pooled, level.query)
        score = score + scale[..., None] * level.query_scale[:, None, None]
        score = score + mass[..., None] * level.query_mass[:, None, None]
        rows.append(pooled)
        extras.append(torch.stack([scale, mass], -1))
        scores.append(score)
    weights = (torch.cat(scores, 2) + position[:, None]).softmax(2)  # (N, B, K, Q)
    weights = weights.unflatten(-1, (value.shape[1], -1))  # (N, B, K, heads, sets)
    parts = weights.split([pooled.shape[2] for pooled in rows], 2)
    attended = torch.zeros((), dtype=value.dtype, device=value.device)
    for part, pooled, extra, by_row, by_moment in zip(parts, rows, extras, value, value_moments, strict=True):
        for inner, by in ((pooled, by_row), (extra, by_moment)):
            mixed = torch.einsum("nbkhs,nbkc->hnbsc", part, inner)
            attended = attended + torch.einsum("hnbsc,hcd->bnshd", mixed, by)
    return attended.flatten(-2)
