"""What a user may choose about calibrating and quantizing, one dataclass a concern."""

from dataclasses import dataclass, field
from pathlib import Path

from uhd_export.checkpoint.options import ImageOptions, SourceOptions
from uhd_export.runtime.errors import UhdError

MIN_SAMPLES = 4


@dataclass(frozen=True)
class CalibrationOptions:
    """`samples` sequences to calibrate on and `held_out` others to judge by, `length` positions at most.

    `data` is a JSONL file of image-question pairs (None: the embedded model's card images) whose relative
    paths start at `image_root` (None: its folder). `seed` chooses and orders the pairs; a pair whose prompt
    is longer than `length` is passed over, answers are cut. `batch` sequences run at once. `questions` is how
    many of the embedded model's questions are asked before and after (None: as many as suit the source).
    """

    data: str | Path | None = None
    image_root: str | Path | None = None
    samples: int = 32
    held_out: int = 8
    length: int = 2048
    seed: int = 0
    batch: int = 1
    questions: int | None = None

    def __post_init__(self) -> None:
        """Raise UhdError naming the first option out of range."""
        if self.image_root is not None and self.data is None:
            raise UhdError(f"image-root {self.image_root}: is where paths of --data start; give both")
        if self.samples < MIN_SAMPLES:
            raise UhdError(f"samples {self.samples}: too few to calibrate on; at least {MIN_SAMPLES}")
        if self.held_out < 1:
            raise UhdError(f"held-out {self.held_out}: at least 1 sequence is needed to judge by")
        if self.seed < 0:
            raise UhdError(f"seed {self.seed}: must be 0 or more")
        if self.length < 1:
            raise UhdError(f"length {self.length}: must be at least 1")
        if self.batch < 1:
            raise UhdError(f"batch {self.batch}: must be at least 1")
        if self.questions is not None and self.questions < 0:
            raise UhdError(f"questions {self.questions}: must be 0 or more")

    @property
    def pairs(self) -> int:
        """How many image-question pairs are needed."""
        return self.samples + self.held_out

    def check_context(self, context: int) -> None:
        """Raise UhdError where sequences would be longer than the model's `context`."""
        if self.length > context:
            raise UhdError(f"length {self.length}: must be from 1 to the model's context of {context}")


@dataclass(frozen=True)
class GptqOptions:
    """4-bit groups of `group` inputs, None for the largest that fits every layer.

    `act_order` (desc_act) quantizes inputs by falling activation size; `damp` is the share of the mean of
    the Hessian's diagonal that is added to it.
    """

    group: int | None = None
    symmetric: bool = True
    act_order: bool = False
    damp: float = 0.05

    def __post_init__(self) -> None:
        """Raise UhdError naming a value out of range."""
        if not 0 < self.damp < 1:
            raise UhdError(f"damp {self.damp}: must be between 0 and 1")

    @property
    def group_size(self) -> int:
        """`group`, where it has been settled."""
        if self.group is None:
            raise ValueError("the group is not settled yet")
        return self.group


@dataclass(frozen=True)
class QuantizeOptions:
    """How a checkpoint is read, its images are cut, it is calibrated, and its weights are rounded.

    `language_only` writes the language part alone, as a plain LLaMA or Qwen2 checkpoint.
    """

    reading: SourceOptions = field(default_factory=SourceOptions)
    images: ImageOptions = field(default_factory=ImageOptions)
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    gptq: GptqOptions = field(default_factory=GptqOptions)
    language_only: bool = False
