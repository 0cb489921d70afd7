"""CLIP's vision tower in PyTorch, for crops of any patch grid, up to the last layer but one."""

import torch
from torch import nn
from torch.nn import functional as F

from uhd_export.model.layers import Layers
from uhd_export.runtime.config import VisionConfig

Geometry = dict[str, torch.Tensor]


class Embeddings(nn.Module):
    """Patches, class token and position table."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(config.hidden))
        self.patch_embedding = nn.Conv2d(3, config.hidden, config.patch, stride=config.patch, bias=False)
        self.position_embedding = nn.Embedding(config.table**2 + 1, config.hidden)

    def forward(self, pixels: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        """(B, 3, 14h, 14w) pixels to (B, 1 + h*w, C)."""
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        cls = self.class_embedding.expand(len(pixels), 1, -1)
        table = self.position_embedding.weight
        y, x = geometry["position_y"], geometry["position_x"]
        side = y.shape[1]
        # Resized in float32 whatever the model's type, as bicubic interpolation is.
        grid = torch.einsum("hi,ijc,wj->hwc", y, table[1:].float().reshape(side, side, -1), x)
        position = torch.cat([table[:1], grid.flatten(0, 1).to(table.dtype)])
        return torch.cat([cls, patches], 1) + position


class Attention(nn.Module):
    """Multi-head self-attention with biases."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj = nn.Linear(config.hidden, config.hidden)
        self.k_proj = nn.Linear(config.hidden, config.hidden)
        self.v_proj = nn.Linear(config.hidden, config.hidden)
        self.out_proj = nn.Linear(config.hidden, config.hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, C) to (B, S, C)."""
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with quick_gelu between."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden, config.intermediate)
        self.fc2 = nn.Linear(config.intermediate, config.hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, C) to (B, S, C)."""
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden, config.eps)
        self.mlp = Mlp(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden, config.eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, C) to (B, S, C)."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The layers, under CLIP's name for them."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = Layers[Layer](Layer(config) for _ in range(config.layers))


class VisionTower(nn.Module):
    """`hidden_states[-2]` without the class token, of equal crops (docs/model.md: Vision tower)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden, config.eps)  # CLIP's own spelling
        self.encoder = Encoder(config)

    def forward(self, pixels: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        """(B, 3, 14h, 14w) pixels to (B, h, w, C) features, channels last."""
        x = self.pre_layrnorm(self.embeddings(pixels, geometry))
        for layer in self.encoder.layers:
            x = layer(x)
        h, w = len(geometry["position_y"]), len(geometry["position_x"])
        return x[:, 1:].unflatten(1, (h, w))
