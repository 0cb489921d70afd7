"""What a pipeline runs with: how images are cut and laid out, room for positions, how tokens are chosen."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.layout import Separators


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. The default is greedy; so is temperature 0.

    `top_k` keeps the k most probable tokens (0: all); `top_p` then keeps the fewest that together reach
    this probability (1: all), and `min_p` those of at least this share of the most probable one's (0: all);
    `seed` makes the choices repeatable. `repetition_penalty` divides the positive logits of the answer's
    tokens so far, and multiplies the negative ones (1: none): the prompt's tokens don't count, as in the
    released code, which gives its prompt as embeddings.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Raise UhdError naming a field that is out of range."""
        if not 0 <= self.temperature < float("inf"):
            raise UhdError(f"temperature: {self.temperature} is out of range; use 0 (greedy) or more")
        if self.top_k < 0:
            raise UhdError(f"top_k: {self.top_k} is out of range; use 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise UhdError(f"top_p: {self.top_p} is out of range; use more than 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise UhdError(f"min_p: {self.min_p} is out of range; use 0 (all tokens) to 1")
        if self.seed is not None and self.seed < 0:
            raise UhdError(f"seed: {self.seed} is out of range; use 0 or more")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UhdError(f"repetition_penalty: {self.repetition_penalty} is out of range; use more than 0")

    @property
    def greedy(self) -> bool:
        """Whether the token of the highest logit is the one that is chosen."""
        return self.temperature == 0 and self.repetition_penalty == 1

    def changed(self, **given: Any) -> "Sampling":
        """The same with what is `given` and not None in its place."""
        return replace(self, **{name: value for name, value in given.items() if value is not None})

    def generator(self) -> np.random.Generator:
        """A new generator from the seed, one for each answer."""
        return np.random.default_rng(self.seed)


@dataclass(frozen=True)
class Settings:
    """How images are cut and prompts are laid out. `grid_mode` and `max_slices` are defaults.

    `resize` is the longest side before slicing or None; `context` the positions of the KV cache; `sampling`
    how tokens are chosen where the caller does not say: the checkpoint's generation_config. `prompt_limit`
    is the number of positions at which the released code cuts a prompt, or None.
    """

    layout: str
    template: str
    separators: Separators
    grid_mode: str
    max_slices: int
    resize: int | None
    upscale_only: bool
    roi_rounding: str
    context: int
    sampling: Sampling = field(default_factory=Sampling)
    prompt_limit: int | None = None
