"""The time of a row's own vision graph, with random weights of the real sizes, on this machine."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from uhd_export.checkpoint.config import CheckpointConfig
from uhd_export.checkpoint.reader import Checkpoint
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
from uhd_export.runtime.profiling.spread import Spread
from uhd_export.study.rows import SIZE, Row


class RandomCheckpoint(Checkpoint):
    """Tensors of a model's vision part, each made from its name when it is read; nothing is stored."""

    def __init__(self, config: CheckpointConfig) -> None:
        modules = Parts.on_meta(config).by_prefix()
        self._shapes = {
            prefix + name: tuple(parameter.shape)
            for prefix, module in modules.items()
            if prefix
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
        emit_vision(config, RandomCheckpoint(config), path, dtype=dtype)
        with open_engine(path, threads=threads, device=device) as engine:
            yield engine


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
