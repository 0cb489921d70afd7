"""The projectors in PyTorch, as the released code computes them: Hiwin (v2) and the v1 baseline."""

import torch
from torch import nn
from torch.nn import functional as F

from uhd_export.model.jbu import JbuStack
from uhd_export.model.pyramid import BilinearPyramid, DeconvolutionPyramid
from uhd_export.model.vit import Geometry
from uhd_export.runtime.config import ProjectorConfig

LN_EPS = 1e-6
QUERY_SETS = (1, 2, 3, 4)


class CrossAttention(nn.Module):
    """torch's MultiheadAttention parameters and arithmetic, one query a window."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden, hidden))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * hidden))
        self.out_proj = nn.Linear(hidden, hidden)

    def weights(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """What (N, D) queries attend to among (B, N, K, D) keys: (B, N, heads, K), which sum to one."""
        q, k = self._project(0, query), self._project(1, keys)
        return torch.einsum("nhd,bnkhd->bnhk", q * q.shape[-1] ** -0.5, k).softmax(-1)

    def forward(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """(N, D) queries over (B, N, K, D) keys and values to (B, N, D)."""
        mixed = torch.einsum("bnhk,bnkhd->bnhd", self.weights(query, keys), self._project(2, values))
        return self.out_proj(mixed.flatten(2))

    def _project(self, part: int, x: torch.Tensor) -> torch.Tensor:
        """Query (0), key (1) or value (2) of (..., D), a row a head: (..., heads, D / heads)."""
        weight, bias = self.in_proj_weight.chunk(3)[part], self.in_proj_bias.chunk(3)[part]
        return F.linear(x, weight, bias).unflatten(-1, (self.heads, -1))


def pool_windows(features: torch.Tensor, roi_y: torch.Tensor, roi_x: torch.Tensor) -> torch.Tensor:
    """RoIAlign of (B, H, W, C) over side x side windows: (B, side^2, bins, C), in float32."""
    pooled = torch.einsum("ipy,byxc,jqx->bijpqc", roi_y, features.float(), roi_x)
    return pooled.flatten(1, 2).flatten(2, 3)


class _Resampler(nn.Module):
    """What both projectors share: pooling with positions, attention, the last projection."""

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        d = config.hidden
        self.side = config.side
        self.pos_embed = nn.Parameter(torch.empty(config.side**2, d))
        self.attn = CrossAttention(d, config.heads)
        self.ln_q = nn.LayerNorm(d, LN_EPS)
        self.ln_kv = nn.LayerNorm(d, LN_EPS)
        self.ln_post = nn.LayerNorm(d, LN_EPS)
        self.proj = nn.Parameter(torch.empty(d, d))

    def keys_and_values(
        self, level: torch.Tensor, scale: int, geometry: Geometry, embedding: torch.Tensor | float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pooled keys and values of one level's (B, H, W, D) map, each (B, N, K, D)."""
        roi = geometry[f"roi_{scale}x_y"], geometry[f"roi_{scale}x_x"]
        table = self.pos_embed.float().unflatten(0, (self.side, self.side))
        position = torch.einsum(
            "ipy,yxc,jqx->ijpqc",
            geometry[f"window_position_{scale}x_y"],
            table,
            geometry[f"window_position_{scale}x_x"],
        )
        values = pool_windows(level, *roi)
        keys = pool_windows(level + embedding, *roi) + position.flatten(0, 1).flatten(1, 2)
        return keys.to(level.dtype), values.to(level.dtype)


Pyramid = JbuStack | BilinearPyramid | DeconvolutionPyramid
_PYRAMIDS: dict[str, type[Pyramid]] = {
    "jbu": JbuStack,
    "bilinear": BilinearPyramid,
    "deconvolution": DeconvolutionPyramid,
}


class Upsampler(nn.Module):
    """What makes the higher levels, one name deeper, as official checkpoints have the JBU stack."""

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        self.upsampler: Pyramid = _PYRAMIDS[config.pyramid](config.vision_hidden, config.stages)


class HiwinProjector(_Resampler):
    """Hierarchical window attention over the feature pyramid (paper section 3.3; docs/model.md)."""

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__(config)
        d, c = config.hidden, config.vision_hidden
        self.levels = config.levels
        for i in QUERY_SETS:
            self.register_parameter(f"query_{i}", nn.Parameter(torch.empty(config.side**2, d)))
        for scale in config.levels:
            self.add_module(f"features_{scale}x_projector", nn.Linear(c, d))
            self.register_parameter(f"feature_{scale}x_embedding", nn.Parameter(torch.empty(1, 1, d)))
        if config.stages:
            self.upsampler = Upsampler(config)
        self.ln_proj = nn.LayerNorm(d, LN_EPS)
        self.cat_proj = nn.Linear(4 * d, d)

    def pyramid(
        self, features: torch.Tensor, pixels: torch.Tensor, geometry: Geometry
    ) -> dict[int, torch.Tensor]:
        """The maps by scale, (B, s*h, s*w, C)."""
        if len(self.levels) == 1:
            return {1: features}
        return self.upsampler.upsampler(features, pixels, geometry)

    def windows(self, maps: dict[int, torch.Tensor], geometry: Geometry) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all levels by window, (B, N, K, D) each."""
        pairs = []
        for scale in self.levels:
            level = self.ln_kv(getattr(self, f"features_{scale}x_projector")(maps[scale]))
            embedding = getattr(self, f"feature_{scale}x_embedding").reshape(-1)
            pairs.append(self.keys_and_values(level, scale, geometry, embedding))
        keys, values = zip(*pairs, strict=True)
        return torch.cat(keys, 2), torch.cat(values, 2)

    def queries(self) -> list[torch.Tensor]:
        """The (N, D) queries of each set."""
        return [self.ln_q(getattr(self, f"query_{i}")) + self.pos_embed for i in QUERY_SETS]

    def attention(self, maps: dict[int, torch.Tensor], geometry: Geometry) -> torch.Tensor:
        """What each window's queries attend to among its keys of all levels: (B, N, sets, heads, K)."""
        keys, _ = self.windows(maps, geometry)
        return torch.stack([self.attn.weights(query, keys) for query in self.queries()], 2)

    def attend(self, maps: dict[int, torch.Tensor], geometry: Geometry) -> torch.Tensor:
        """The pyramid's maps to (B, side^2, D) tokens."""
        keys, values = self.windows(maps, geometry)
        # One attention a query set, keys and values projected anew: as the released code runs.
        sets = [self.ln_proj(self.attn(query, keys, values)) for query in self.queries()]
        return self.ln_post(self.cat_proj(torch.cat(sets, -1))) @ self.proj

    def forward(self, features: torch.Tensor, pixels: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        """(B, h, w, C) features and (B, 3, H, W) pixels to (B, side^2, D) tokens."""
        return self.attend(self.pyramid(features, pixels, geometry), geometry)


class V1Projector(_Resampler):
    """The LLaVA-UHD projector, the paper's baseline: one level, one query set."""

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__(config)
        self.query = nn.Parameter(torch.empty(config.side**2, config.hidden))
        self.kv_proj = nn.Linear(config.vision_hidden, config.hidden, bias=False)

    def forward(self, features: torch.Tensor, pixels: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        """(B, h, w, C) features to (B, side^2, D) tokens; `pixels` is not used."""
        keys, values = self.keys_and_values(self.ln_kv(self.kv_proj(features)), 1, geometry)
        query = self.ln_q(self.query) + self.pos_embed
        return self.ln_post(self.attn(query, keys, values)) @ self.proj
