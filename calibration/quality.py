"""How good a quantized language model is, measured on held-out sequences."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch.nn import functional as F

_CHUNK = 1024


@dataclass(frozen=True)
class LinearQuality:
    """One linear layer. Errors are ||x (W - Wq)^T||^2 / ||x W^T||^2 over held-out inputs x of the
    unquantized model, so that both weights are judged on the same inputs.

    `samples` is the number of calibration tokens that it saw; `fallback` why GPTQ was not used for it.
    """

    layer: int
    module: str
    outputs: int
    inputs: int
    samples: int
    fallback: str | None
    rtn_error: float
    gptq_error: float


@dataclass(frozen=True)
class Accuracy:
    """Exact answers out of `questions` held-out questions of the embedded model, by what the weights were."""

    questions: int
    exact: Mapping[str, int]


@dataclass(frozen=True)
class ModelQuality:
    """The whole model against the unquantized one, at `tokens` positions that predict its greedy tokens.

    `kl` is the mean Kullback-Leibler divergence of the predicted distributions in nats, `agreement` the
    share of positions with the same most likely token.
    """

    tokens: int
    kl: float
    agreement: float


def output_error(inputs: torch.Tensor, dense: torch.Tensor, quantized: torch.Tensor) -> float:
    """||x (W - Wq)^T||^2 / ||x W^T||^2 for rows x (T, K) and weights (N, K)."""
    difference = dense - quantized
    wrong = total = 0.0
    for rows in inputs.split(_CHUNK):
        wrong += float((rows @ difference.T).double().square().sum())
        total += float((rows @ dense.T).double().square().sum())
    return wrong / total if total else 0.0


def model_quality(expected: torch.Tensor, actual: torch.Tensor) -> ModelQuality:
    """Compare (T, vocab) logits with those of the unquantized model."""
    reference, other = F.log_softmax(expected.double(), -1), F.log_softmax(actual.double(), -1)
    kl = (reference.exp() * (reference - other)).sum(-1).mean()
    same = (expected.argmax(-1) == actual.argmax(-1)).double().mean()
    return ModelQuality(len(expected), max(float(kl), 0.0), float(same))


@dataclass(frozen=True)
class Report:
    """Everything measured while quantizing. `bytes_before` and `bytes_after` count the weights of the
    quantized layers; `settings` and `tools` say how it was done; `accuracy` is measured on the embedded
    model only; `int8_head` is GPTQ with a rounded head beside it, as bundles for ONNX Runtime have it.
    """

    settings: Mapping[str, object]
    tools: Mapping[str, str]
    calibration_tokens: int
    held_out_tokens: int
    bytes_before: int
    bytes_after: int
    rtn: ModelQuality
    gptq: ModelQuality
    accuracy: Accuracy | None
    linears: tuple[LinearQuality, ...]
    int8_head: ModelQuality | None = None

    @property
    def mean_rtn_error(self) -> float:
        """Mean over all linears."""
        return float(np.mean([linear.rtn_error for linear in self.linears]))

    @property
    def mean_gptq_error(self) -> float:
        """Mean over all linears."""
        return float(np.mean([linear.gptq_error for linear in self.linears]))

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """Names of the linears that GPTQ did not quantize, with the reason."""
        return tuple(
            f"model.layers.{linear.layer}.{linear.module}: {linear.fallback}"
            for linear in self.linears
            if linear.fallback is not None
        )

    def to_json(self) -> dict:
        """A JSON object, means and fallbacks included."""
        return {
            **asdict(self),
            "linears": [asdict(linear) for linear in self.linears],
            "mean_rtn_error": self.mean_rtn_error,
            "mean_gptq_error": self.mean_gptq_error,
            "fallbacks": list(self.fallbacks),
        }

    @staticmethod
    def from_json(value: dict) -> "Report":
        """The report that `to_json` wrote."""
        fields = {name: value[name] for name in Report.__dataclass_fields__ if name != "int8_head"}
        fields["linears"] = tuple(LinearQuality(**linear) for linear in value["linears"])
        if value["accuracy"] is not None:
            fields["accuracy"] = Accuracy(**value["accuracy"])
        fields["rtn"], fields["gptq"] = ModelQuality(**value["rtn"]), ModelQuality(**value["gptq"])
        if value.get("int8_head") is not None:  # which reports of before do not have
            fields["int8_head"] = ModelQuality(**value["int8_head"])
        return Report(**fields)
