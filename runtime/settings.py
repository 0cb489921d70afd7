"""What a pipeline runs with: how images are cut and laid out, and the room for positions."""

from dataclasses import dataclass

from uhd_export.runtime.image.layout import Separators


@dataclass(frozen=True)
class Settings:
    """How images are cut and prompts are laid out. `grid_mode` and `max_slices` are defaults.

    `resize` is the longest side before slicing or None; `context` the positions of the KV cache.
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
