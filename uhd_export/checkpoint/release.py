"""Which release of LLaVA-UHD wrote a config, and the fields that would ask for another function."""

import json

from uhd_export.checkpoint.fields import optional, required, shown
from uhd_export.runtime.errors import UhdError

# (feature_mode, model_mode, mm_projector_type) of each kind: its projector, windows an axis and release.
# The branch LLaVA-UHD-v1 wrote neither mode; the branch head's names come in several query counts.
_KINDS = {
    ("featup_muti_res", None, "adapt_spatial_resampler"): ("hiwin", 12, "first"),
    ("uhd_v1", None, "adapt_spatial_resampler"): ("v1", 12, "first"),
    (None, None, "adapt_spatial_resampler"): ("v1", 12, "branch"),
    (None, "uhd_v1", "adapt_spatial_resampler_v1"): ("v1", 12, "branch"),
    (None, "uhd_v1", "uhd_v1_query64"): ("v1", 8, "branch"),
    (None, "uhd_v2", "adapt_spatial_resampler_v2"): ("hiwin", 12, "branch"),
    (None, "uhd_v2", "adapt_spatial_resampler_v2_64"): ("hiwin", 8, "branch"),
    (None, "uhd_v2", "adapt_spatial_resampler_v2_256"): ("hiwin", 16, "branch"),
}


def projector_kind(config: dict) -> tuple[str, int, str]:
    """(kind, windows an axis, release); where both modes are written, `model_mode` counts."""
    name = required(config, "mm_projector_type", str)
    model_mode = optional(config, "model_mode", str, None)
    feature_mode = optional(config, "feature_mode", str, None) if model_mode is None else None
    found = _KINDS.get((feature_mode, model_mode, name))
    if found is not None:
        return found
    for index, field, value in ((0, "feature_mode", feature_mode), (1, "model_mode", model_mode)):
        known = sorted(name for name in {kind[index] for kind in _KINDS} if name)
        if value is not None and value not in known:
            raise UhdError(f"config field {field}: {shown(value)}: expected {' or '.join(known)}")
    fitting = sorted({kind[2] for kind in _KINDS if kind[:2] == (feature_mode, model_mode)})
    if (feature_mode, model_mode) == (None, None) and any(name == kind[2] for kind in _KINDS):
        raise UhdError(f"config field model_mode: missing; mm_projector_type {shown(name)} needs it")
    raise UhdError(
        f"config field mm_projector_type: {shown(name)} is not supported; expected {' or '.join(fitting)}, "
        "as LLaVA-UHD's checkpoints have"
    )


# Fields that change what the released code computes, and their only supported value.
_FIXED = {
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "mm_patch_merge_type": "flat",
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "s2": False,
    "hidden_act": "silu",
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "scale_embeddings": False,
}


def refuse_other_functions(config: dict) -> None:
    """Raise UhdError naming the first field that asks for something that is not exported."""
    for field, expected in _FIXED.items():
        kind = (int, float) if isinstance(expected, float) else type(expected)
        value = optional(config, field, kind, expected)
        if value != expected:
            raise UhdError(
                f"config field {field}: {shown(value)} is not supported; expected {json.dumps(expected)}, "
                "or no such field"
            )
