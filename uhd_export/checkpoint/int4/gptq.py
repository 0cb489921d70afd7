"""Checkpoints whose linear layers are GPTQ-quantized already, read like any other."""

import re
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import torch

from uhd_export.checkpoint.int4.linears import LM_HEAD
from uhd_export.checkpoint.int4.settings import check_settings, quantization_settings
from uhd_export.checkpoint.int4.weight import QuantizedWeight
from uhd_export.checkpoint.int4.words import (
    FORMATS,
    group_order,
    group_size,
    middle_word,
    unpack_gptq,
    word_bits,
)
from uhd_export.checkpoint.reader import Checkpoint
from uhd_export.runtime.errors import UhdError

_PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class _Layer:
    """What the shapes of a layer's tensors, and the settings for it, say."""

    bits: int
    inputs: int
    outputs: int
    groups: int
    size: int  # inputs in a group; fewer in the last one where it does not divide


class GptqCheckpoint(Checkpoint):
    """A checkpoint with GPTQ layers that reads as if it held their dequantized weights.

    For every module NAME with a `NAME.qweight`, `NAME.weight` is a tensor like the others, and
    `quantized(NAME)` are the integers themselves. Bits and groups are each layer's own.
    """

    def __init__(self, folder: Path, vocab: int | None = None) -> None:
        super().__init__(folder, vocab)
        self.settings = quantization_settings(self.folder) or {}
        self.format = check_settings(self.folder, self.settings)
        modules = sorted(n.removesuffix(".qweight") for n in self._where if n.endswith(".qweight"))
        if not modules:
            raise UhdError(
                f"checkpoint {self.folder}: config field quantization_config says gptq, "
                "but there is no qweight tensor; remove the field or download it again"
            )
        self._layers = {module: self._layer(module) for module in modules}
        self.format = self._symmetric_format()
        for module in modules:
            self._where[f"{module}.weight"] = self._where[f"{module}.qweight"]
        self._recent: tuple[str, QuantizedWeight] | None = None

    def _setting(self, module: str, field: str) -> Any:
        """Setting `field` of `module`: its own where a pattern of `dynamic` fits, or everyone's."""
        for pattern, own in (self.settings.get("dynamic") or {}).items():
            try:
                fits = re.match(pattern.removeprefix("+:"), module)
            except re.error as error:
                raise UhdError(
                    f"checkpoint {self.folder}: config field quantization_config.dynamic: {pattern!r} is no "
                    f"regular expression ({error})"
                ) from None
            if fits and not pattern.startswith("-:") and isinstance(own, dict) and field in own:
                return own[field]
        return self.settings.get(field)

    def _layer(self, module: str) -> _Layer:
        stated = self._setting(module, "group_size")
        if stated is not None and (not isinstance(stated, int) or isinstance(stated, bool) or stated < -1):
            raise UhdError(
                f"checkpoint {self.folder}: config field quantization_config.group_size: "
                f"{str(stated)[:40]!r} of layer {module} must be a whole number or -1"
            )
        shapes = [super(GptqCheckpoint, self).shape(f"{module}.{part}") for part in _PARTS[:3]]
        try:
            bits = word_bits(shapes[1], shapes[2])
            inputs, groups = shapes[0][0] * (32 // bits), shapes[2][0]
            return _Layer(bits, inputs, shapes[2][1], groups, group_size(inputs, groups, stated))
        except UhdError as error:
            raise self._named(module, error) from None

    def _named(self, module: str, error: UhdError) -> UhdError:
        return UhdError(f"checkpoint {self.folder}: layer {module}: {error}")

    def _symmetric_format(self) -> str:
        """The format that the zero points show, which are all the middle of the range where `sym` is true.

        Optimum's config says "gptq_v2" where they are of version 1.
        """
        forms: set[str] = set()
        for module in sorted(self._layers):
            if not self._setting(module, "sym"):
                continue
            words = {form: middle_word(self._layers[module].bits, form) for form in FORMATS}
            zeros = self.stored(f"{module}.qzeros")
            form = next((form for form, word in words.items() if (zeros == word).all()), None)
            if form is None or forms - {form}:
                expected = " nor all ".join(f"0x{word & 0xFFFFFFFF:08x}" for word in words.values())
                raise UhdError(
                    f"checkpoint {self.folder}: config field quantization_config.sym is true, but tensor "
                    f"{module}.qzeros is neither all {expected} as in the other layers; "
                    "set the field to false if its zero points differ, or quantize the checkpoint again"
                )
            forms.add(form)
        return forms.pop() if forms else self.format

    def is_quantized(self, module: str) -> bool:
        """Whether linear layer `module` is quantized."""
        return module in self._layers

    def names(self) -> set[str]:
        """Every tensor name but `zero_biases`, with a weight in place of each quantized layer's parts."""
        parts = {f"{module}.{part}" for module in self._layers for part in _PARTS}
        return set(self._where) - parts - self.zero_biases()

    def zero_biases(self) -> set[str]:
        """Biases of zeros, which AutoGPTQ wrote for layers that have none."""
        biases = {f"{module}.bias" for module in self._layers} & set(self._where)
        return {name for name in biases if not self.tensor(name).any()}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name`, without reading it."""
        layer = self._layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if layer is None:
            return super().shape(name)
        cut = name == f"{LM_HEAD}.weight" and self.vocab is not None
        return min(layer.outputs, self.vocab) if cut and self.vocab else layer.outputs, layer.inputs

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Tensor `name`, dequantized (to float32 where `dtype` is None) if its layer is quantized."""
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in self._layers:
            return torch.from_numpy(self.quantized(module).dequantize()).to(dtype or torch.float32)
        return super().tensor(name, dtype)

    def bits(self, module: str) -> int:
        """Bits of a code of quantized layer `module`."""
        return self._layers[module].bits

    def group(self, module: str) -> int:
        """Inputs in a group of quantized layer `module`, as `quantized` returns them."""
        layer = self._layers[module]
        return gcd(layer.size, layer.inputs)

    def order(self, module: str) -> np.ndarray | None:
        """The act-order of `module` (see `QuantizedWeight.order`); reads `g_idx` alone."""
        name, layer = f"{module}.g_idx", self._layers[module]
        if name not in self._where:
            return None
        try:
            return group_order(self.stored(name).numpy(), layer.inputs, layer.groups, layer.size)
        except UhdError as error:
            raise self._named(module, error) from None

    def symmetric(self, module: str) -> bool:
        """Whether every zero point of `module` is the middle of the range; reads `qzeros` alone."""
        word = middle_word(self._layers[module].bits, self.format)
        return bool((self.stored(f"{module}.qzeros") == word).all())

    def quantized(self, module: str) -> QuantizedWeight:
        """The integers of quantized layer `module`. The last one read is kept."""
        if self._recent is None or self._recent[0] != module:
            self._recent = None
            read = self.stored
            g_idx = read(f"{module}.g_idx").numpy() if f"{module}.g_idx" in self._where else None
            qweight, qzeros = read(f"{module}.qweight").numpy(), read(f"{module}.qzeros").numpy()
            scales = read(f"{module}.scales").float().numpy()
            size = self._layers[module].size
            try:
                weight = unpack_gptq(qweight, qzeros, scales, g_idx, self.format, size)
            except UhdError as error:
                raise self._named(module, error) from None
            if module == LM_HEAD and self.vocab is not None:
                weight = weight.rows(self.vocab)
            self._recent = module, weight
        return self._recent[1]


def open_checkpoint(folder: Path, vocab: int | None = None) -> Checkpoint:
    """The checkpoint in `folder`, plain or GPTQ-quantized, its vocabulary cut to `vocab` tokens."""
    quantized = quantization_settings(Path(folder)) is not None
    return (GptqCheckpoint if quantized else Checkpoint)(Path(folder), vocab)
