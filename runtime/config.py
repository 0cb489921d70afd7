"""The sizes that decide how much work and memory a model takes, as a bundle's manifest records them."""

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.geometry import crop_geometry

HEAD_SIZE = 128
"""Channels of an attention head in the projector, whatever its width."""


@dataclass(frozen=True)
class VisionConfig:
    """CLIP's vision tower; `layers` counts those that run (the last of the model never does)."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    image_size: int
    patch: int
    eps: float

    @property
    def table(self) -> int:
        """Side of the position table, in patches."""
        return self.image_size // self.patch


@dataclass(frozen=True)
class ProjectorConfig:
    """The projector: `kind` is "hiwin" or "v1", `levels` the scales in use, `side` its windows an axis.

    `pyramid` is how the maps of higher levels are made, one of PYRAMIDS.
    """

    kind: str
    hidden: int
    vision_hidden: int
    levels: tuple[int, ...]
    side: int
    pyramid: str = "jbu"

    @property
    def heads(self) -> int:
        """Attention heads, 128 channels each."""
        return self.hidden // HEAD_SIZE

    @property
    def stages(self) -> tuple[int, ...]:
        """Scales that the feature pyramid computes on its way to the highest level."""
        return self.scales[1:]

    @property
    def scales(self) -> tuple[int, ...]:
        """Every scale that the graph computes, those on the way to the highest level included."""
        return tuple(scale for scale in (1, 2, 4, 8) if scale <= max(self.levels))


@dataclass(frozen=True)
class LanguageKind:
    """What tells one family of language models from another: `template` is how it is asked by default."""

    qkv_bias: bool
    template: str


LANGUAGE_KINDS = {
    "llama": LanguageKind(qkv_bias=False, template="vicuna_v1"),
    "qwen2": LanguageKind(qkv_bias=True, template="qwen"),
}


@dataclass(frozen=True)
class LanguageConfig:
    """The decoder; `kind` is one of LANGUAGE_KINDS."""

    kind: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    context: int
    eps: float
    rope_theta: float
    tied: bool
    bos: int | None
    eos: tuple[int, ...]

    @property
    def qkv_bias(self) -> bool:
        """Whether q, k and v have biases."""
        return LANGUAGE_KINDS[self.kind].qkv_bias


@dataclass(frozen=True)
class ModelConfig:
    """The three parts of the model."""

    vision: VisionConfig
    projector: ProjectorConfig
    language: LanguageConfig

    def geometry(
        self, rows: int, cols: int, *, grid_mode: str = "selective", roi_rounding: str = "exact"
    ) -> dict[str, NDArray[Any]]:
        """float32 matrices for a crop of so many patches, by the graph's input names; see `crop_geometry`."""
        return crop_geometry(
            rows,
            cols,
            levels=self.projector.levels,
            pyramid=self.projector.pyramid,
            grid_mode=grid_mode,
            side=self.projector.side,
            table=self.vision.table,
            patch=self.vision.patch,
            roi_rounding=roi_rounding,
        )


def official(name: str, levels: tuple[int, ...] = (1, 2, 4)) -> ModelConfig:
    """The shape of an official model by the name of its language model, see OFFICIAL."""
    if name not in OFFICIAL:
        raise UhdError(f"model {name!r}: must be one of {', '.join(OFFICIAL)}")
    language = OFFICIAL[name]
    return ModelConfig(
        VIT_L_14_336, ProjectorConfig("hiwin", language.hidden, VIT_L_14_336.hidden, levels, 12), language
    )


# The released checkpoints' parts (openai/clip-vit-large-patch14-336 without its unused last layer).
VIT_L_14_336 = VisionConfig(1024, 4096, 23, 16, 336, 14, 1e-5)
OFFICIAL = {
    "Vicuna-7B": LanguageConfig(
        "llama", 4096, 11008, 32, 32, 32, 128, 32000, 4096, 1e-5, 1e4, False, 1, (2,)
    ),
    "Vicuna-13B": LanguageConfig(
        "llama", 5120, 13824, 40, 40, 40, 128, 32000, 4096, 1e-5, 1e4, False, 1, (2,)
    ),
    "Qwen2-7B": LanguageConfig(
        "qwen2", 3584, 18944, 28, 28, 4, 128, 152064, 32768, 1e-6, 1e6, False, None, (151645,)
    ),
}
