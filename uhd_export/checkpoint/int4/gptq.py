"""Checkpoints whose linear layers are GPTQ-quantized already, read like any other."""

from pathlib import Path

import numpy as np
import torch

from uhd_export.checkpoint.fields import read_json
from uhd_export.checkpoint.int4.weight import QuantizedWeight
from uhd_export.checkpoint.int4.words import FORMATS, group_order, unpack_gptq
from uhd_export.checkpoint.reader import Checkpoint
from uhd_export.runtime.errors import UhdError

_PARTS = ("qweight", "qzeros", "scales", "g_idx")
# Words of eight zero points in the middle of the range, by format.
_MIDDLE = {"gptq": 0x77777777, "gptq_v2": -0x77777778}


def gptq_config(folder: Path) -> dict | None:
    """The quantization settings of the checkpoint in `folder`, or None where its weights are plain.

    They are config.json's `quantization_config`, or AutoGPTQ's quantize_config.json.
    """
    config = folder / "config.json"
    settings = read_json(config).get("quantization_config") if config.is_file() else None
    separate = folder / "quantize_config.json"
    if settings is None and separate.is_file():
        settings = {"quant_method": "gptq", **read_json(separate)}
    return settings


def _check(settings: dict) -> str:
    """The format of supported settings; UhdError names the field of others."""

    def refuse(field: str, value: object, expected: str) -> None:
        raise UhdError(
            f"config field quantization_config.{field}: {value!r} is not supported; expected {expected}"
        )

    method, bits = settings.get("quant_method", "gptq"), settings.get("bits")
    if method != "gptq":
        refuse("quant_method", method, "'gptq'")
    if bits != 4:
        refuse("bits", bits, "4")
    form = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if form not in FORMATS:
        refuse("format", form, " or ".join(map(repr, FORMATS)))
    if settings.get("pack_dtype", "int32") != "int32":
        refuse("pack_dtype", settings["pack_dtype"], "'int32'")
    return form


class GptqCheckpoint(Checkpoint):
    """A checkpoint with GPTQ layers that reads as if it held their dequantized weights.

    For every module NAME with a `NAME.qweight`, `NAME.weight` is a tensor like the others, and
    `quantized(NAME)` are the integers themselves.
    """

    def __init__(self, folder: Path, vocab: int | None = None) -> None:
        super().__init__(folder, vocab)
        self.settings = gptq_config(self.folder) or {}
        self.format = _check(self.settings)
        self._modules = {n.removesuffix(".qweight") for n in self._where if n.endswith(".qweight")}
        if not self._modules:
            raise UhdError(
                f"checkpoint {self.folder}: config field quantization_config says gptq, "
                "but there is no qweight tensor; remove the field or download it again"
            )
        if self.settings.get("sym"):
            self.format = self._symmetric_format()
        for module in self._modules:
            self._where[f"{module}.weight"] = self._where[f"{module}.qweight"]
        self._recent: tuple[str, QuantizedWeight] | None = None

    def _symmetric_format(self) -> str:
        """The format that the zero points show, which are all the middle of the range where `sym` is true.

        Optimum's config says "gptq_v2" where they are of version 1.
        """
        forms: set[str] = set()
        for module in sorted(self._modules):
            zeros = self.stored(f"{module}.qzeros")
            form = next((form for form, word in _MIDDLE.items() if (zeros == word).all()), None)
            if form is None or forms - {form}:
                raise UhdError(
                    f"checkpoint {self.folder}: config field quantization_config.sym is true, but tensor "
                    f"{module}.qzeros is neither all 0x77777777 nor all 0x88888888 as in the other layers; "
                    "set the field to false if its zero points differ, or quantize the checkpoint again"
                )
            forms.add(form)
        return forms.pop()

    def is_quantized(self, module: str) -> bool:
        """Whether linear layer `module` is quantized."""
        return module in self._modules

    def names(self) -> set[str]:
        """Every tensor name, with a weight in place of each quantized layer's parts.

        AutoGPTQ wrote a bias of zeros for layers without one: those are left out.
        """
        parts = {f"{module}.{part}" for module in self._modules for part in _PARTS}
        biases = {f"{module}.bias" for module in self._modules} & set(self._where)
        return set(self._where) - parts - {name for name in biases if not self.tensor(name).any()}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name`, without reading it."""
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in self._modules:
            rows, outputs = super().shape(f"{module}.qweight")
            return outputs, rows * 8
        return super().shape(name)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Tensor `name`, dequantized (to float32 where `dtype` is None) if its layer is quantized."""
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in self._modules:
            return torch.from_numpy(self.quantized(module).dequantize()).to(dtype or torch.float32)
        return super().tensor(name, dtype)

    def groups(self, module: str) -> int:
        """Groups along the inputs of quantized layer `module`."""
        return super().shape(f"{module}.scales")[0]

    def order(self, module: str) -> np.ndarray | None:
        """The act-order of `module` (see `QuantizedWeight.order`); reads `g_idx` alone."""
        name = f"{module}.g_idx"
        if name not in self._where:
            return None
        try:
            g_idx = self.stored(name).numpy()
            return group_order(g_idx, self.shape(f"{module}.weight")[1], self.groups(module))
        except UhdError as error:
            raise UhdError(f"checkpoint {self.folder}: layer {module}: {error}") from None

    def symmetric(self, module: str) -> bool:
        """Whether every zero point of `module` is the middle of the range; reads `qzeros` alone."""
        return bool((self.stored(f"{module}.qzeros") == _MIDDLE[self.format]).all())

    def quantized(self, module: str) -> QuantizedWeight:
        """The integers of quantized layer `module`. The last one read is kept."""
        if self._recent is None or self._recent[0] != module:
            self._recent = None
            read = self.stored
            g_idx = read(f"{module}.g_idx").numpy() if f"{module}.g_idx" in self._where else None
            qweight, qzeros = read(f"{module}.qweight").numpy(), read(f"{module}.qzeros").numpy()
            scales = read(f"{module}.scales").float().numpy()
            try:
                self._recent = module, unpack_gptq(qweight, qzeros, scales, g_idx, self.format)
            except UhdError as error:
                raise UhdError(f"checkpoint {self.folder}: layer {module}: {error}") from None
        return self._recent[1]


def open_checkpoint(folder: Path, vocab: int | None = None) -> Checkpoint:
    """The checkpoint in `folder`, plain or GPTQ-quantized, its vocabulary cut to `vocab` tokens."""
    return (Checkpoint if gptq_config(Path(folder)) is None else GptqCheckpoint)(Path(folder), vocab)
