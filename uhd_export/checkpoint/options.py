"""What a user may choose about reading a checkpoint, and about how its images are cut."""

from dataclasses import dataclass
from pathlib import Path

from uhd_export.checkpoint.fields import choice
from uhd_export.runtime.choices import GRID_MODES, LAYOUTS, ROI_ROUNDINGS, TEMPLATES
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.slicing import MAX_SLICES

MASKS = tuple(range(1, 16, 2))
"""Values of `feature_scale_mask`: bits 1, 2, 4, 8 are levels 1x, 2x, 4x, 8x, and the first is always in."""


@dataclass(frozen=True)
class SourceOptions:
    """How a checkpoint is read where it does not say so itself, or says it wrongly; None: as it says.

    `revision` is a branch, tag or commit of a checkpoint on the hub (None: its main branch). `config` is a
    path that replaces the folder's config.json; `vision_tower` a folder or hub id that replaces its
    `mm_vision_tower`; `layout` is flat or merged; `mask` the feature_scale_mask; `template` the conversation
    template.
    """

    config: str | Path | None = None
    vision_tower: str | Path | None = None
    layout: str | None = None
    mask: int | None = None
    template: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        """Raise UhdError naming the first option out of range."""
        choice("layout", self.layout, (None, *LAYOUTS))
        choice("mask", self.mask, (None, *MASKS))
        choice("template", self.template, (None, *TEMPLATES))


@dataclass(frozen=True)
class ImageOptions:
    """How images are cut: into `max_slices` at most, after `resize` to a longest side (None: as they are).

    `grid_mode` chooses the grids of windows, `roi_rounding` is exact, or bf16 as the released code rounds.
    """

    grid_mode: str = "selective"
    max_slices: int = MAX_SLICES
    resize: int | None = None
    roi_rounding: str = "exact"

    def __post_init__(self) -> None:
        """Raise UhdError naming the first option out of range."""
        choice("grid_mode", self.grid_mode, GRID_MODES)
        choice("roi_rounding", self.roi_rounding, ROI_ROUNDINGS)
        if self.max_slices < 1:
            raise UhdError(f"max slices {self.max_slices}: must be at least 1 (1 means overview only)")
        if self.resize is not None and self.resize < 1:
            raise UhdError(f"resize {self.resize}: the longest side must be at least one pixel")
