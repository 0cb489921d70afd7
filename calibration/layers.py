"""One decoder layer at a time: loading it, running sequences through it, capturing what its linears see."""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from uhd_export.calibration.activations import Activations, Batch
from uhd_export.checkpoint.reader import Checkpoint
from uhd_export.model.language import DecoderLayer, rotary_tables
from uhd_export.runtime.config import LanguageConfig

# Linears that see the same input, in the order in which data reaches them.
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
MODULES = tuple(name for group in GROUPS for name in group)


class _Reached(Exception):
    """Ends a forward pass at the linear whose input is wanted; no error."""


def load_layer(checkpoint: Checkpoint, config: LanguageConfig, index: int) -> DecoderLayer:
    """Layer `index` in float32."""
    with torch.device("meta"):
        layer = DecoderLayer(config)
    checkpoint.load_into(layer, f"model.layers.{index}.", torch.float32)
    return layer


def linear(layer: DecoderLayer, name: str) -> nn.Linear:
    """The linear of `layer` called `name`, one of MODULES."""
    module = layer.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{name} is no linear layer")
    return module


class LayerRunner:
    """Runs sequences through layers of one model, `batch` at a time."""

    def __init__(self, config: LanguageConfig, longest: int, batch: int = 1) -> None:
        self.batch = batch
        self._tables = rotary_tables(config, torch.arange(longest))

    def _forward(self, layer: DecoderLayer, batch: Batch) -> torch.Tensor:
        x = batch.padded
        length = x.shape[1]
        return layer(x, *(table[:length] for table in self._tables), [None], 0)

    @torch.inference_mode()
    def advance(
        self,
        layer: DecoderLayer,
        activations: Activations,
        watch: Callable[[str, torch.Tensor], None] | None = None,
    ) -> None:
        """Replace `activations` by the layer's outputs.

        `watch(name, rows)` is called with the real input rows (T, K) of the first linear of each group.
        """
        for batch in activations.batches(self.batch):
            hooks = []
            if watch is not None:
                for group in GROUPS:
                    hooks.append(
                        layer.get_submodule(group[0]).register_forward_pre_hook(
                            lambda _, inputs, name=group[0], batch=batch: watch(name, batch.real(inputs[0]))
                        )
                    )
            try:
                batch.replace(self._forward(layer, batch))
            finally:
                for hook in hooks:
                    hook.remove()

    @torch.inference_mode()
    def inputs(self, layer: DecoderLayer, activations: Activations, name: str) -> Iterator[torch.Tensor]:
        """The real input rows (T, K) of linear `name`, a batch at a time; what follows it is not run."""
        caught: list[torch.Tensor] = []

        def catch(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            caught.append(inputs[0])
            raise _Reached

        for batch in activations.batches(self.batch):
            hook = layer.get_submodule(name).register_forward_pre_hook(catch)
            try:
                self._forward(layer, batch)
            except _Reached:
                pass
            finally:
                hook.remove()
            yield batch.real(caught.pop())
