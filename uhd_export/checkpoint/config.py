"""Configurations: an official `config.json`, of either release, as typed dataclasses."""

from dataclasses import dataclass
from pathlib import Path

from uhd_export.checkpoint.fields import choice, optional, read_json, required, size
from uhd_export.checkpoint.vision_tower import given_tower, recorded_tower
from uhd_export.runtime.config import HEAD_SIZE, LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.geometry import GRID_MODES
from uhd_export.runtime.image.layout import COMMA, LAYOUTS, NEWLINE, Separators
from uhd_export.runtime.settings import ROI_ROUNDINGS

# `</s>`, which every LLaMA tokenizer has and transformers takes where no config says otherwise.
LLAMA_EOS = 2
QUERY_SIDES = {"": 12, "_64": 8, "_256": 16}


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

    @property
    def model(self) -> ModelConfig:
        """The three parts' sizes."""
        return ModelConfig(self.vision, self.projector, self.language)


def read_config(
    folder: Path,
    *,
    config: str | Path | None = None,
    vision_tower: str | Path | None = None,
    layout: str | None = None,
    mask: int | None = None,
) -> CheckpointConfig:
    """The typed configuration of the checkpoint in `folder`.

    `config` replaces its config.json; `vision_tower` (folder or hub id) its `mm_vision_tower`.
    """
    raw = read_json(Path(config) if config else folder / "config.json")
    tower = given_tower(folder, vision_tower) if vision_tower else recorded_tower(folder, raw)
    path = folder / "generation_config.json"
    generating = read_json(path) if path.is_file() else None
    return parse_config(raw, tower, generating, layout=layout, mask=mask)


def parse_config(
    config: dict,
    tower: dict,
    generating: dict | None = None,
    *,
    layout: str | None = None,
    mask: int | None = None,
) -> CheckpointConfig:
    """Typed configuration from a checkpoint's `config.json`, its CLIP's and its `generation_config.json`.

    Both generations are read: `feature_mode: featup_muti_res` (December 2024) and `model_mode:
    uhd_v2` / `uhd_v1`. `layout` and `mask` override what the config says.
    Raises UhdError naming the field that is missing or not supported.
    """
    kind, suffix, release = _projector_kind(config)
    language = _language(config, generating or {})
    vision = _vision(config, tower)
    if language.hidden % HEAD_SIZE:
        raise UhdError(
            f"config field hidden_size: {language.hidden} is not a multiple of {HEAD_SIZE}, "
            "which the projector's attention needs"
        )
    if mask is None:
        mask = optional(config, "feature_scale_mask", int, 7)
    levels = (1,) if kind == "v1" else mask_levels(mask)
    return CheckpointConfig(
        vision=vision,
        projector=ProjectorConfig(kind, language.hidden, vision.hidden, levels, QUERY_SIDES[suffix]),
        language=language,
        layout=layout or ("merged" if release == "first" else "flat"),
        template="qwen" if language.kind == "qwen2" else "vicuna_v1",
        separators=_separators(config),
        upscale_only=release == "first",
        release=release,
    )


def mask_levels(mask: int) -> tuple[int, ...]:
    """Scales of `feature_scale_mask`: bits 1, 2, 4, 8 are levels 1x, 2x, 4x, 8x."""
    if not isinstance(mask, int) or isinstance(mask, bool) or not 1 <= mask <= 15 or not mask & 1:
        raise UhdError(
            f"config field feature_scale_mask: {mask!r} is not supported; "
            "use an odd number up to 15 (3, 5, 7 as released, 15 for levels 0 to 3)"
        )
    return tuple(scale for scale in (1, 2, 4, 8) if mask & scale)


def _separators(config: dict) -> Separators:
    ids = optional(config, "mm_separator_token_ids", list, [COMMA, NEWLINE])
    if len(ids) != 2 or any(type(i) is not int or i < 0 for i in ids):
        raise UhdError(
            f"config field mm_separator_token_ids: {ids!r} must be two token ids, comma and newline"
        )
    return Separators(*ids)


def _projector_kind(config: dict) -> tuple[str, str, str]:
    """(kind, query suffix, release) from the fields of either release."""
    name = required(config, "mm_projector_type", str)
    if config.get("feature_mode") is not None and config.get("model_mode") is None:
        if config["feature_mode"] != "featup_muti_res":
            raise UhdError(
                f"config field feature_mode: {config['feature_mode']!r} is not supported; "
                "expected 'featup_muti_res'"
            )
        if name != "adapt_spatial_resampler":
            raise _unsupported_projector(name)
        return "hiwin", "", "first"
    mode = required(config, "model_mode", str)
    kinds = {
        "uhd_v2": ("hiwin", "adapt_spatial_resampler_v2"),
        "uhd_v1": ("v1", "adapt_spatial_resampler_v1"),
    }
    if mode not in kinds:
        raise UhdError(f"config field model_mode: {mode!r} is not supported; expected uhd_v1 or uhd_v2")
    kind, base = kinds[mode]
    if not name.startswith(base) or name[len(base) :] not in QUERY_SIDES:
        raise _unsupported_projector(name)
    return kind, name[len(base) :], "branch"


def _unsupported_projector(name: str) -> UhdError:
    return UhdError(
        f"config field mm_projector_type: {name!r} is not supported; expected "
        "adapt_spatial_resampler (first release) or adapt_spatial_resampler_v1/_v2 with model_mode"
    )


def _language(config: dict, generating: dict) -> LanguageConfig:
    model_type = required(config, "model_type", str)
    kinds = {
        "llava_llama": "llama",
        "llama": "llama",
        "llava_qwen": "qwen2",
        "llava_qwen2": "qwen2",
        "qwen2": "qwen2",
    }
    if model_type not in kinds:
        raise UhdError(
            f"config field model_type: {model_type!r} is not supported; expected one of {', '.join(kinds)}"
        )
    kind = kinds[model_type]
    activation = optional(config, "hidden_act", str, "silu")
    if activation != "silu":
        raise UhdError(f"config field hidden_act: {activation!r} is not supported; expected 'silu'")
    if config.get("attention_bias") and kind == "llama":
        raise UhdError("config field attention_bias: true is not supported for LLaMA models")
    if config.get("use_sliding_window"):
        raise UhdError("config field use_sliding_window: true is not supported; expected false")
    rope = {}
    for field in ("rope_scaling", "rope_parameters"):
        rope = rope or optional(config, field, dict, {})
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise UhdError(
                f"config field {field}: only the default rotary embedding is supported; expected null"
            )
    hidden, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
    if hidden % heads:
        raise UhdError(f"config field num_attention_heads: {heads} does not divide hidden_size {hidden}")
    kv_heads = size(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise UhdError(
            f"config field num_key_value_heads: {kv_heads} does not divide num_attention_heads {heads}"
        )
    return LanguageConfig(
        kind=kind,
        hidden=hidden,
        intermediate=size(config, "intermediate_size"),
        layers=size(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_size=size(config, "head_dim", hidden // heads),
        vocab=size(config, "vocab_size"),
        context=size(config, "max_position_embeddings"),
        eps=float(required(config, "rms_norm_eps", (int, float))),
        rope_theta=float(optional(config, "rope_theta", (int, float), rope.get("rope_theta", 10000.0))),
        tied=bool(config.get("tie_word_embeddings", False)),
        bos=optional(config, "bos_token_id", int, None),
        eos=_eos(config, generating, kind),
    )


def _eos(config: dict, generating: dict, kind: str) -> tuple[int, ...]:
    """The ids that end a text: those of config.json first, and whatever generation_config.json adds."""
    ids = []
    for values, where in ((config, "config"), (generating, "generation config")):
        found = optional(values, "eos_token_id", (int, list), [], where)
        found = found if isinstance(found, list) else [found]
        if any(type(i) is not int or i < 0 for i in found):
            raise UhdError(f"{where} field eos_token_id: {found!r} must be a token id or a list of them")
        ids += found
    if not ids and kind != "llama":
        raise UhdError(
            "config field eos_token_id: missing, in generation_config.json too; add the id that ends a text"
        )
    return tuple(dict.fromkeys(ids)) or (LLAMA_EOS,)


def _vision(config: dict, tower: dict) -> VisionConfig:
    tower = tower.get("vision_config", tower)
    where = "vision config"
    layer = optional(config, "mm_vision_select_layer", int, -2)
    if layer != -2:
        raise UhdError(f"config field mm_vision_select_layer: {layer} is not supported; expected -2")
    if optional(config, "mm_vision_select_feature", str, "patch") != "patch":
        raise UhdError("config field mm_vision_select_feature: only 'patch' is supported")
    activation = optional(tower, "hidden_act", str, "quick_gelu", where)
    if activation != "quick_gelu":
        raise UhdError(f"{where} field hidden_act: {activation!r} is not supported; expected 'quick_gelu'")
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
    layers = size(tower, "num_hidden_layers", where=where)
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
        eps=float(optional(tower, "layer_norm_eps", (int, float), 1e-5, where)),
    )


def check_image_options(
    layout: str | None, grid_mode: str, max_slices: int, resize: int | None, roi_rounding: str
) -> None:
    """Raise UhdError naming the first option of how images are cut and laid out that is out of range."""
    choice("layout", layout, (None, *LAYOUTS))
    choice("grid_mode", grid_mode, GRID_MODES)
    choice("roi_rounding", roi_rounding, ROI_ROUNDINGS)
    if max_slices < 1:
        raise UhdError(f"max slices {max_slices}: must be at least 1 (1 means overview only)")
    if resize is not None and resize < 1:
        raise UhdError(f"resize {resize}: the longest side must be at least one pixel")
