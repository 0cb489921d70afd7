"""Window attention over pooled rows in plain PyTorch: what the fused kernel must equal.

The Hiwin projector, folded (docs: exact folding), attends in each window from `Q = heads * sets`
queries to the pooled rows of all levels. Letters in shapes: B crops, N = side^2 windows, K bins of a
window at one level, C vision channels, Q queries with the head as the slow axis.
"""

from typing import Generic, NamedTuple, TypeVar

import torch

T = TypeVar("T")


class Level(NamedTuple, Generic[T]):
    """One level's inputs: tensors here, values of a graph where ONNX is written."""

    features: T  # (B, H, W, C)
    scale: T  # (B, H, W): the LayerNorm's scalar of each pixel
    roi_y: T  # (side, bins_y, H)
    roi_x: T  # (side, bins_x, W)
    position_y: T  # (side, bins_y, side)
    position_x: T  # (side, bins_x, side)
    query: T  # (N, C, Q): folded queries against scaled features
    query_scale: T  # (N, Q): against the pooled scale
    query_mass: T  # (N, Q): against the pooled constant one


class Mixed(NamedTuple):
    """One level's share of the attention's output."""

    rows: torch.Tensor  # (heads, N, B, sets, C): mixed scaled features
    moments: torch.Tensor  # (heads, N, B, sets, 2): mixed scale and mixed mass


def pool(features: torch.Tensor, roi_y: torch.Tensor, roi_x: torch.Tensor) -> torch.Tensor:
    """RoIAlign of (B, H, W, C) to (N, B, K, C)."""
    pooled = torch.einsum("ipy,byxc,jqx->ijbpqc", roi_y, features, roi_x)
    return pooled.flatten(0, 1).flatten(2, 3)


def outer(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(side, bins_y, A) and (side, bins_x, B) to (N, K, A * B)."""
    return torch.einsum("ipa,jqb->ijpqab", y, x).flatten(4, 5).flatten(2, 3).flatten(0, 1)


def window_attention(
    levels: list[Level[torch.Tensor]], query_position: torch.Tensor, sets: int = 4
) -> list[Mixed]:
    """Attend in every window over all levels' pooled rows; one softmax over their concatenation.

    `query_position` (N, Q, side^2) scores the position table's cells. The score of a row is
    query . pooled(scale * features) + query_scale * pooled(scale) + query_mass * mass + position,
    mass being the pooled constant one (1 except where samples fall outside the map).
    Source: paper section 3.3, equations of the folding in `uhd_export.model.folding`.
    """
    rows, extras, scores = [], [], []
    for level in levels:
        pooled = pool(level.features * level.scale[..., None], level.roi_y, level.roi_x)
        scale = pool(level.scale[..., None], level.roi_y, level.roi_x)[..., 0]
        mass = outer(level.roi_y.sum(-1, keepdim=True), level.roi_x.sum(-1, keepdim=True))[..., 0]
        mass = mass[:, None].expand_as(scale)
        position = torch.einsum("nqt,nkt->nkq", query_position, outer(level.position_y, level.position_x))
        score = torch.einsum("nbkc,ncq->nbkq", pooled, level.query) + position[:, None]
        score = score + scale[..., None] * level.query_scale[:, None, None]
        score = score + mass[..., None] * level.query_mass[:, None, None]
        rows.append(pooled)
        extras.append(torch.stack([scale, mass], -1))
        scores.append(score)
    weights = torch.cat(scores, 2).softmax(2).unflatten(-1, (-1, sets))  # (N, B, K, heads, sets)
    out, start = [], 0
    for pooled, extra in zip(rows, extras, strict=True):
        part = weights[:, :, start : start + pooled.shape[2]]
        start += pooled.shape[2]
        mixed = (torch.einsum("nbkhs,nbkc->hnbsc", part, value) for value in (pooled, extra))
        out.append(Mixed(*mixed))
    return out
