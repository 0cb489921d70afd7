"""How much memory quantizing takes, so that a machine that is too small says so at once."""

from dataclasses import dataclass

from calibration.gptq import ERROR_ROWS
from calibration.sequences import SequenceOptions
from runtime.errors import UhdError
from runtime.memory import available_memory
from uhd_export.config import ModelConfig
from uhd_export.int4 import layer_linears

# torch, gptqmodel and what they import: a cautious guess.
_LIBRARIES = 900 << 20
# Matrices of the Hessian's size, and of the weight's, held while solving: counted in the code, not measured.
_HESSIANS, _WEIGHTS = 5, 4


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by cause, all float32."""

    libraries: int
    layer: int
    activations: int
    solver: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.libraries + self.layer + self.activations + self.solver


def estimate_memory(config: ModelConfig, options: SequenceOptions, batch: int) -> MemoryEstimate:
    """The peak while the largest linear is solved, with sequences of the greatest length allowed."""
    language = config.language
    shapes = layer_linears(language).values()
    layer = 4 * sum(n * k for n, k in shapes)
    rows = (options.samples + 3 * options.held_out) * options.length
    forward = batch * options.length * (3 * language.intermediate + 6 * language.hidden)
    inputs = ERROR_ROWS * (3 * language.hidden + language.intermediate)
    activations = 4 * (rows * language.hidden + forward + inputs)
    solver = 4 * max(_HESSIANS * k * k + _WEIGHTS * n * k for n, k in shapes)
    return MemoryEstimate(_LIBRARIES, layer, activations, solver)


def require_memory(config: ModelConfig, options: SequenceOptions, batch: int) -> MemoryEstimate:
    """The estimate. Raises UhdError where the machine has less."""
    estimate, available = estimate_memory(config, options, batch), available_memory()
    if available is not None and estimate.total > available:
        raise UhdError(
            f"quantizing needs about {estimate.total / 1e9:.1f} GB of memory "
            f"({estimate.activations / 1e9:.1f} GB of it for activations) and {available / 1e9:.1f} GB are "
            "available; lower --samples or --length, or use --weights int4-rtn"
        )
    return estimate
