"""The language model in PyTorch: a LLaMA or Qwen2 decoder with a growing KV cache."""

import torch
from torch import nn
from torch.nn import functional as F

from uhd_export.model.layers import Layers
from uhd_export.runtime.config import LanguageConfig

Cache = list[tuple[torch.Tensor, torch.Tensor] | None]


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis."""
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rotary_tables(config: LanguageConfig, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, (S, head_size / 2) each in float32, of integer `positions`."""
    frequency = config.rope_theta ** (
        -torch.arange(0, config.head_size, 2, dtype=torch.float32) / config.head_size
    )
    angle = positions[:, None].float() * frequency
    return angle.cos(), angle.sin()


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class SelfAttention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.config = config
        d, kv = config.heads * config.head_size, config.kv_heads * config.head_size
        self.q_proj = nn.Linear(config.hidden, d, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden, kv, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden, kv, bias=config.qkv_bias)
        self.o_proj = nn.Linear(d, config.hidden, bias=False)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: Cache, index: int
    ) -> torch.Tensor:
        """(B, S, D) to (B, S, D), extending `cache[index]`."""
        size = self.config.head_size
        q, k, v = (
            p(x).unflatten(-1, (-1, size)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        past = cache[index]
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        cache[index] = (k, v)
        length, total = q.shape[2], k.shape[2]
        mask = torch.ones(length, total, dtype=torch.bool, device=x.device).tril(total - length)
        out = F.scaled_dot_product_attention(
            q, k, v, mask, enable_gqa=self.config.kv_heads != self.config.heads
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.down_proj = nn.Linear(config.intermediate, config.hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, D) to (B, S, D)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.mlp = GatedMlp(config)
        self.input_layernorm = RMSNorm(config.hidden, config.eps)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.eps)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: Cache, index: int
    ) -> torch.Tensor:
        """(B, S, D) to (B, S, D)."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, index)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embeddings, layers and the last norm: what official checkpoints call `model`."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab, config.hidden)
        self.layers = Layers[DecoderLayer](DecoderLayer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.eps)


class LanguageModel(nn.Module):
    """Decoder with embeddings and head, under the official tensor names."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tied:
            self.lm_head = nn.Linear(config.hidden, config.vocab, bias=False)

    def new_cache(self) -> Cache:
        """An empty KV cache."""
        return [None] * self.config.layers

    def forward(
        self, embeds: torch.Tensor, cache: Cache | None = None, *, last_only: bool = False
    ) -> torch.Tensor:
        """(B, S, D) embeddings to (B, S, vocab) logits, or (B, 1, vocab) with `last_only`."""
        cache = self.new_cache() if cache is None else cache
        past = 0 if cache[0] is None else cache[0][0].shape[2]
        cos, sin = rotary_tables(self.config, torch.arange(past, past + embeds.shape[1]))
        cos, sin = cos.to(embeds), sin.to(embeds)
        x = embeds
        for i, layer in enumerate(self.model.layers):
            x = layer(x, cos, sin, cache, i)
        x = self.model.norm(x[:, -1:] if last_only else x)
        head = self.model.embed_tokens.weight if self.config.tied else self.lm_head.weight
        return F.linear(x, head)
