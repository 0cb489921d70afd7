"""Small random language models, LLaMA and Qwen2, for the tests of graphs and decoders."""

import functools

import numpy as np
import torch

from uhd_export.model.language import LanguageModel
from uhd_export.runtime.config import LanguageConfig

# (kind, heads, kv_heads, tied): full attention, grouped with biases and a tied head, one shared head.
MODELS = [("llama", 4, 4, False), ("qwen2", 4, 2, True), ("llama", 4, 1, False)]
CONTEXT = 96


@functools.cache
def tiny_model(kind: str, heads: int, kv_heads: int, tied: bool) -> LanguageModel:
    """A model of two layers with weights of a scale that keeps activations near 1."""
    config = LanguageConfig(
        kind=kind,
        hidden=128,
        intermediate=192,
        layers=2,
        heads=heads,
        kv_heads=kv_heads,
        head_size=32,
        vocab=300,
        context=CONTEXT,
        eps=1e-5,
        rope_theta=10000.0,
        tied=tied,
        bos=1,
        eos=(2,),
    )
    model = LanguageModel(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(heads * 10 + kv_heads)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            noise = 1 + 0.1 * noise
        elif noise.ndim > 1:
            noise = 1.2 * noise / parameter.shape[1] ** 0.5
        parameter.data = noise
    return model


def reader(model: LanguageModel):
    """The model's tensors by official name."""
    return dict(model.named_parameters()).__getitem__


def embeddings(count: int, seed: int = 0) -> np.ndarray:
    """(1, count, 128) float32."""
    return np.random.RandomState(seed).standard_normal((1, count, 128)).astype(np.float32)


def reference(model: LanguageModel, embeds: np.ndarray) -> np.ndarray:
    """(S, vocab) logits of PyTorch without a cache."""
    return model(torch.from_numpy(embeds))[0].numpy()


def difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """||a - b|| / ||b||."""
    assert actual.shape == expected.shape
    return float(np.linalg.norm(actual.astype(np.float64) - expected) / np.linalg.norm(expected))
