"""How much memory quantizing takes, so that a machine that is too small says so at once."""

from dataclasses import dataclass, replace

from uhd_export.calibration.gptq import ERROR_ROWS
from uhd_export.calibration.options import CalibrationOptions
from uhd_export.checkpoint.config import CheckpointConfig
from uhd_export.checkpoint.int4.linears import layer_linears
from uhd_export.runtime.config import ModelConfig
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.memory import available_memory

# torch, gptqmodel and what they import: a cautious guess.
_LIBRARIES = 900 << 20
# Matrices of the Hessian's size, and of the weight's, held while solving: counted in the code, not measured.
_HESSIANS, _WEIGHTS = 5, 4
# Language models that are asked questions: as it was, rounded, and quantized.
_MODELS = 3


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by cause, all float32.

    `vision` encodes images, then a `layer` is solved after another; `whole` models answer questions last.
    """

    libraries: int
    vision: int
    layer: int
    activations: int
    solver: int
    whole: int

    @property
    def total(self) -> int:
        """The peak: what follows one another is not in memory together."""
        solving = self.layer + self.activations + self.solver
        return self.libraries + max(self.vision, solving, self.vision + self.whole if self.whole else 0)


def estimate_memory(
    config: CheckpointConfig | ModelConfig, options: CalibrationOptions, questions: int
) -> MemoryEstimate:
    """What quantizing takes, with sequences of the greatest length allowed; `questions` need whole models."""
    language, tower, projector = config.language, config.vision, config.projector
    shapes = layer_linears(language).values()
    layer = 4 * sum(n * k for n, k in shapes)
    rows = (options.samples + 3 * options.held_out) * options.length
    forward = options.batch * options.length * (3 * language.intermediate + 6 * language.hidden)
    inputs = ERROR_ROWS * (3 * language.hidden + language.intermediate)
    activations = 4 * (rows * language.hidden + forward + inputs)
    solver = 4 * max(_HESSIANS * k * k + _WEIGHTS * n * k for n, k in shapes)
    weights = tower.layers * (4 * tower.hidden**2 + 2 * tower.hidden * tower.intermediate)
    # The projector's widest: keys and values of the pyramid mode, and a 4x map in D channels.
    wide = projector.hidden * (6 * 144 * 126 + 8 * 16 * 540)
    vision = 4 * (weights + 12 * projector.hidden**2 + wide + rows * language.hidden)
    model = language.layers * layer + 4 * (1 if language.tied else 2) * language.vocab * language.hidden
    return MemoryEstimate(_LIBRARIES, vision, layer, activations, solver, _MODELS * model if questions else 0)


def require_memory(config: CheckpointConfig, options: CalibrationOptions, questions: int) -> MemoryEstimate:
    """The estimate. Raises UhdError where the machine has less."""
    estimate, available = estimate_memory(config, options, questions), available_memory()
    if available is not None and estimate.total > available:
        if replace(estimate, whole=0).total <= available:  # it is the questions that are too much
            cause, size, remedy = "whole models in float32", estimate.whole, "use --eval 0"
        else:
            cause, size = "activations", estimate.activations
            remedy = "lower --samples or --length, or use --weights int4-rtn"
        raise UhdError(
            f"quantizing needs about {estimate.total / 1e9:.1f} GB of memory ({size / 1e9:.1f} GB of it "
            f"for {cause}) and {available / 1e9:.1f} GB are available; {remedy}"
        )
    return estimate
