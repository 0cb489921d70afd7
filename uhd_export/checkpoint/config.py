"""Configurations: an official `config.json`, of either release, as typed dataclasses."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from uhd_export.checkpoint.fields import optional, positive, read_json, shown, size
from uhd_export.checkpoint.language_config import default_sampling, language_config, layer_count
from uhd_export.checkpoint.options import MASKS, ImageOptions, SourceOptions
from uhd_export.checkpoint.release import projector_kind, refuse_other_functions
from uhd_export.checkpoint.tokenizer import checkpoint_tokenizer, has_tokenizer, vocabulary_size
from uhd_export.checkpoint.vision_tower import given_tower, recorded_tower
from uhd_export.runtime.choices import PYRAMIDS
from uhd_export.runtime.config import (
    HEAD_SIZE,
    LANGUAGE_KINDS,
    LanguageConfig,
    ModelConfig,
    ProjectorConfig,
    VisionConfig,
)
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.layout import COMMA, NEWLINE, Separators
from uhd_export.runtime.settings import Sampling, Settings


@dataclass(frozen=True)
class CheckpointConfig:
    """Everything that decides what the model computes."""

    vision: VisionConfig
    projector: ProjectorConfig
    language: LanguageConfig
    layout: str
    template: str
    separators: Separators
    upscale_only: bool
    release: str
    sampling: Sampling = field(default_factory=Sampling)
    prompt_limit: int | None = None

    @property
    def model(self) -> ModelConfig:
        """The three parts' sizes."""
        return ModelConfig(self.vision, self.projector, self.language)

    def settings(self, images: ImageOptions, context: int | None = None) -> Settings:
        """What a pipeline of this model runs with; `context` None is the model's own."""
        return Settings(
            layout=self.layout,
            template=self.template,
            separators=self.separators,
            grid_mode=images.grid_mode,
            max_slices=images.max_slices,
            resize=images.resize,
            upscale_only=self.upscale_only,
            roi_rounding=images.roi_rounding,
            context=context or self.language.context,
            sampling=self.sampling,
            prompt_limit=self.prompt_limit,
        )


def read_config(folder: Path, options: SourceOptions | None = None) -> CheckpointConfig:
    """The typed configuration of the checkpoint in `folder`, read as `options` say.

    The vocabulary is cut to the tokenizer's, as the released code does: rows without a token never win.
    """
    options = options or SourceOptions()
    raw = read_json(Path(options.config) if options.config else folder / "config.json")
    given = options.vision_tower
    tower = given_tower(folder, given) if given else recorded_tower(folder, raw)
    path = folder / "generation_config.json"
    generating = read_json(path) if path.is_file() else None
    parsed = parse_config(raw, tower, generating, layout=options.layout, mask=options.mask)
    parsed = replace(parsed, template=options.template or parsed.template)
    parsed = replace(parsed, language=cut_vocabulary(folder, parsed.language))
    _refuse_ids_without_tokens(parsed)
    return parsed


def _refuse_ids_without_tokens(config: CheckpointConfig) -> None:
    """Raise UhdError where an id that the model needs is one of the rows that were cut."""
    separators = config.separators
    for name, ids in (
        ("eos_token_id", config.language.eos),
        ("mm_separator_token_ids", (separators.comma, separators.newline)),
    ):
        if max(ids) >= config.language.vocab:
            raise UhdError(
                f"config field {name}: {max(ids)} is no token of the tokenizer, which has "
                f"{config.language.vocab} tokens; are its added tokens missing (tokenizer.json, or "
                "added_tokens.json and tokenizer_config.json)?"
            )


def cut_vocabulary(folder: Path, language: LanguageConfig) -> LanguageConfig:
    """`language` with the vocabulary of the tokenizer in `folder`, where it is smaller."""
    if not has_tokenizer(folder):
        return language
    return replace(language, vocab=min(language.vocab, vocabulary_size(checkpoint_tokenizer(folder))))


def parse_config(
    config: dict,
    tower: dict,
    generating: dict | None = None,
    *,
    layout: str | None = None,
    mask: int | None = None,
) -> CheckpointConfig:
    """Typed configuration from a checkpoint's `config.json`, its CLIP's and its `generation_config.json`.

    Every release is read: `feature_mode: featup_muti_res` or `uhd_v1` (December 2024), `model_mode: uhd_v2`
    or `uhd_v1`, and the branch LLaVA-UHD-v1 without either. `layout` and `mask` override the config's.
    Raises UhdError naming the field that is missing or not supported.
    """
    kind, side, release = projector_kind(config)
    refuse_other_functions(config)
    language = language_config(config, generating or {})
    vision = _vision(config, tower)
    if language.hidden % HEAD_SIZE:
        raise UhdError(
            f"config field hidden_size: {language.hidden} is not a multiple of {HEAD_SIZE}, "
            "which the projector's attention needs"
        )
    if mask is None:
        mask = optional(config, "feature_scale_mask", int, 7)
    levels = (1,) if kind == "v1" else mask_levels(mask)
    pyramid = optional(config, "feature_pyramid", str, PYRAMIDS[0])
    if pyramid not in PYRAMIDS or (kind == "v1" and pyramid != PYRAMIDS[0]):
        expected = PYRAMIDS[0] if kind == "v1" else ", ".join(PYRAMIDS)
        raise UhdError(f"config field feature_pyramid: {pyramid!r} is not supported; expected {expected}")
    return CheckpointConfig(
        vision=vision,
        projector=ProjectorConfig(kind, language.hidden, vision.hidden, levels, side, pyramid),
        language=language,
        layout=layout or ("merged" if release == "first" else "flat"),
        template=LANGUAGE_KINDS[language.kind].template,
        separators=_separators(config, language.vocab),
        upscale_only=release == "first",
        release=release,
        sampling=default_sampling(generating or {}),
        prompt_limit=_prompt_limit(config, release),
    )


def _prompt_limit(config: dict, release: str) -> int | None:
    """Where the first release cuts prompts; the later ones don't."""
    if release != "first" or config.get("tokenizer_model_max_length") is None:
        return None
    return size(config, "tokenizer_model_max_length")


def mask_levels(mask: int) -> tuple[int, ...]:
    """Scales of `feature_scale_mask`: bits 1, 2, 4, 8 are levels 1x, 2x, 4x, 8x."""
    if isinstance(mask, bool) or mask not in MASKS:
        raise UhdError(
            f"config field feature_scale_mask: {mask!r} is not supported; "
            "use an odd number up to 15 (3, 5, 7 as released, 15 for levels 0 to 3)"
        )
    return tuple(scale for scale in (1, 2, 4, 8) if mask & scale)


def _separators(config: dict, vocab: int) -> Separators:
    ids = optional(config, "mm_separator_token_ids", list, [COMMA, NEWLINE])
    if len(ids) != 2 or any(type(i) is not int or not 0 <= i < vocab for i in ids):
        raise UhdError(
            f"config field mm_separator_token_ids: {str(ids)[:60]} must be two token ids, comma and newline, "
            f"below the vocabulary's {vocab}"
        )
    return Separators(*ids)


def _vision(config: dict, tower: dict) -> VisionConfig:
    where = "vision config"
    tower = optional(tower, "vision_config", dict, tower, where)
    activation = optional(tower, "hidden_act", str, "quick_gelu", where)
    if activation != "quick_gelu":
        raise UhdError(
            f"{where} field hidden_act: {shown(activation)} is not supported; expected 'quick_gelu'"
        )
    hidden, heads = size(tower, "hidden_size", where=where), size(tower, "num_attention_heads", where=where)
    if hidden % heads:
        raise UhdError(f"{where} field num_attention_heads: {heads} does not divide hidden_size {hidden}")
    expected = size(config, "mm_hidden_size", hidden)
    if expected != hidden:
        raise UhdError(
            f"config field mm_hidden_size: {expected} differs from the vision tower's hidden_size {hidden}; "
            "pass the matching --vision-tower"
        )
    patch, image_size = size(tower, "patch_size", where=where), size(tower, "image_size", where=where)
    if patch != 14:
        raise UhdError(f"{where} field patch_size: {patch} is not supported; expected 14")
    if image_size % patch:
        raise UhdError(f"{where} field image_size: {image_size} is not a multiple of patch_size {patch}")
    layers = layer_count(tower, where)
    if layers < 2:
        raise UhdError(
            f"{where} field num_hidden_layers: {layers} is too few; features leave the last but one"
        )
    return VisionConfig(
        hidden=hidden,
        intermediate=size(tower, "intermediate_size", where=where),
        layers=layers - 1,
        heads=heads,
        image_size=image_size,
        patch=patch,
        eps=positive(tower, "layer_norm_eps", 1e-5, where),
    )
