"""What a user may choose about how the language model's weights are stored."""

from dataclasses import dataclass

from uhd_export.checkpoint.fields import choice
from uhd_export.runtime.choices import HEADS

WEIGHTS = ("auto", "dense", "int4", "int4-rtn")
AUTO = "auto"
ACTIVATIONS = {"int8": 4, "float": 1}
"""Types of what int4 weights are multiplied with, by ONNX Runtime's accuracy level."""


@dataclass(frozen=True)
class WeightOptions:
    """What a user may choose of the language model's weights.

    `weights`: auto takes a GPTQ checkpoint as it is and others dense; dense dequantizes; int4 wants a GPTQ
    checkpoint; int4-rtn rounds to the nearest in groups of `group` inputs (None: the largest that fits).
    `lm_head` auto is int8 beside int4 weights on ONNX Runtime, dense elsewhere. `activations` int8 is the
    faster product of ONNX Runtime.
    """

    weights: str = "auto"
    group: int | None = None
    lm_head: str = AUTO
    activations: str = "int8"

    def __post_init__(self) -> None:
        """Raise UhdError naming the first option out of range."""
        choice("weights", self.weights, WEIGHTS)
        choice("lm_head", self.lm_head, (AUTO, *HEADS))
        choice("activations", self.activations, ACTIVATIONS)
