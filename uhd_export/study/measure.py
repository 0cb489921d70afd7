"""Times of a row's vision graph and of a cut of its language model, random weights, on this machine."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from uhd_export.checkpoint.config import CheckpointConfig
from uhd_export.checkpoint.reader import Checkpoint
from uhd_export.graph.int4.choose import linear_format, resolve
from uhd_export.graph.int4.options import WeightOptions
from uhd_export.graph.language import emit_language
from uhd_export.graph.vision import emit_vision
from uhd_export.model.uhd import Parts
from uhd_export.runtime.config import LANGUAGE_KINDS, ModelConfig
from uhd_export.runtime.engines.backends import open_engine
from uhd_export.runtime.engines.base import Engine
from uhd_export.runtime.image.encoder import VisionEncoder
from uhd_export.runtime.image.layout import Separators
from uhd_export.runtime.image.pattern import pattern
from uhd_export.runtime.image.pixels import cut
from uhd_export.runtime.image.slicing import plan_slices
from uhd_export.runtime.language.decoder import Decoder
from uhd_export.runtime.profiling.spread import Spread
from uhd_export.study.rows import SIZE, Row

_STEPS = 8


class RandomCheckpoint(Checkpoint):
    """Tensors of a model, each made from its name when it is read; nothing is stored."""

    def __init__(self, config: CheckpointConfig) -> None:
        modules = Parts.on_meta(config).by_prefix()
        self._shapes = {
            prefix + name: tuple(parameter.shape)
            for prefix, module in modules.items()
            for name, parameter in module.named_parameters()
        }

    def names(self) -> set[str]:
        """Every tensor name."""
        return set(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name`."""
        return self._shapes[name]

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Tensor `name`: of a scale that keeps activations of order one, gains around one."""
        shape = self._shapes[name]
        value = torch.randn(
            shape, generator=torch.Generator().manual_seed(len(name) * 31 + sum(map(ord, name)))
        )
        if len(shape) >= 2 and "query" not in name and "pos_embed" not in name:
            value = value / float(np.prod(shape[1:])) ** 0.5
        elif name.endswith("weight") or name.endswith("sigma_spatial"):
            value = 1 + 0.1 * value
        else:
            value = 0.1 * value
        return value.to(dtype or torch.float32)

    def load_into(self, module: torch.nn.Module, prefix: str, dtype: torch.dtype) -> None:
        """Give `module`, which is on the meta device, its tensors."""
        state = {name: self.tensor(prefix + name, dtype) for name, _ in module.named_parameters()}
        module.load_state_dict(state, assign=True)
        module.requires_grad_(False)


def checkpoint_config(model: ModelConfig, layout: str = "flat") -> CheckpointConfig:
    """What a checkpoint of these sizes would say of itself."""
    template = LANGUAGE_KINDS[model.language.kind].template
    return CheckpointConfig(
        model.vision, model.projector, model.language, layout, template, Separators(), False, "branch"
    )


@contextmanager
def vision_engine(model: ModelConfig, *, threads: int | None, device: str | None) -> Iterator[Engine]:
    """The vision graph of `model` with random weights, in ONNX Runtime; its files go when it is closed."""
    config = checkpoint_config(model)
    dtype = "float32" if device in (None, "cpu") else "float16"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vision.onnx"
        emit_vision(config, RandomCheckpoint(config), path, dtype=dtype, contrib=dtype == "float32")
        with open_engine(path, threads=threads, device=device) as engine:
            yield engine


@dataclass(frozen=True)
class LanguageCut:
    """Seconds of prefill and of a decoding step of `layers` of the model's `of_layers`, and the head.

    Nothing is multiplied out to all layers. `weights` says how they are stored.
    """

    layers: int
    of_layers: int
    positions: int
    weights: str
    prefill: Spread
    decode: Spread


def language_cut(
    model: ModelConfig, positions: int, repeats: int, *, layers: int, threads: int | None, device: str | None
) -> LanguageCut:
    """`repeats` prefills of `positions`, a few steps after each, of int4 weights as `build` stores them."""
    whole = model.language
    few = replace(model, language=replace(whole, layers=min(layers, whole.layers)))
    config = checkpoint_config(few)
    checkpoint = RandomCheckpoint(config)
    stored = resolve(checkpoint, config.language, WeightOptions(weights="int4-rtn"))
    assert stored is not None
    dtype = "float32" if device in (None, "cpu") else "float16"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "language.onnx"
        form = linear_format(checkpoint, config.language, stored, "onnxruntime")
        emit_language(config.language, checkpoint, path, dtype=dtype, linear=form)
        with open_engine(path, threads=threads, device=device) as engine:
            decoder = Decoder(engine, positions + _STEPS)
            prompt = np.random.default_rng(0).standard_normal((positions, whole.hidden), np.float32)
            prefills: list[float] = []
            steps: list[float] = []
            for _ in range(repeats + 1):
                decoder.rewind(0)
                start = time.perf_counter()
                decoder.prefill(prompt)
                prefills.append(time.perf_counter() - start)
                steps = []
                for _ in range(_STEPS):
                    start = time.perf_counter()
                    decoder.step(prompt[:1])
                    steps.append(time.perf_counter() - start)
    return LanguageCut(
        few.language.layers,
        whole.layers,
        positions,
        f"int4 in groups of {stored.group}, head {stored.lm_head}, activations {stored.activations}",
        Spread.of(prefills[1:]),
        Spread.of(steps),
    )


def vision_seconds(engine: Engine, row: Row, repeats: int) -> Spread:
    """Seconds of all crops of the study's image through `engine`, once to warm up and `repeats` times."""
    plan = plan_slices(SIZE, patch=row.model.vision.patch)
    encoder = VisionEncoder(engine, row.model)
    batches = [feeds for _, feeds in encoder.batches(cut(pattern(*SIZE), plan), row.grid_mode)]
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for feeds in batches:
            engine.infer(feeds)
        seconds.append(time.perf_counter() - start)
    return Spread.of(seconds[1:])
