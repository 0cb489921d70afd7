"""What a checkpoint says about how it was quantized, and by whom; others than GPTQ are refused by name."""

import json
from pathlib import Path
from typing import NoReturn

from uhd_export.checkpoint.fields import read_json
from uhd_export.checkpoint.int4.words import FORMATS
from uhd_export.runtime.errors import UhdError

FIELD = "quantization_config"
# Files that hold the settings where config.json does not: AutoGPTQ's (which AutoAWQ also wrote), AutoAWQ's.
_SEPARATE = ("quantize_config.json", "quant_config.json")


def quantization_settings(folder: Path) -> dict | None:
    """The quantization settings of the checkpoint in `folder`, or None where its weights are plain.

    They are config.json's `quantization_config`, or a file of their own. Raises UhdError where they are no
    JSON object.
    """
    config = folder / "config.json"
    settings = read_json(config).get(FIELD) if config.is_file() else None
    if settings is not None and not isinstance(settings, dict):
        raise UhdError(
            f"{config}: config field {FIELD} must be an object or null, not {str(settings)[:40]!r}"
        )
    if settings is not None:
        return settings
    separate = next((folder / name for name in _SEPARATE if (folder / name).is_file()), None)
    return None if separate is None else read_json(separate)


def method(settings: dict) -> str:
    """The tool or method that made the weights, as it is called in config.json."""
    stated = settings.get("quant_method", settings.get("method"))
    if stated is not None:
        return str(stated).lower()
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    if "w_bit" in settings or "q_group_size" in settings or "zero_point" in settings:
        return "awq"
    return "gptq"


def check_settings(folder: Path, settings: dict) -> str:
    """The zero points' format (see `words`) of supported settings; UhdError names the field of others."""

    def refuse(field: str, expected: str) -> NoReturn:
        value = json.dumps(settings.get(field))[:60]
        raise UhdError(
            f"checkpoint {folder}: config field {FIELD}.{field}: {value} is not supported; expected "
            f"{expected}; pass the original checkpoint, and `uhd-export quantize` it"
        )

    made_by = method(settings)
    if made_by in ("auto-round", "intel/auto-round"):
        packing = str(settings.get("packing_format") or settings.get("backend") or "")
        if "gptq" not in packing:
            refuse("packing_format", "auto_round:auto_gptq")
    elif made_by != "gptq":
        raise UhdError(
            f"checkpoint {folder}: config field {FIELD}.quant_method: {made_by[:40]!r} is not supported; "
            "expected 'gptq'; pass the original checkpoint, and `uhd-export quantize` it"
        )
    if settings.get("bits") not in (4, 8) or isinstance(settings["bits"], bool):
        refuse("bits", "4 or 8")
    if settings.get("is_marlin_format"):
        refuse("is_marlin_format", "false")
    form = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if form not in FORMATS:
        refuse("checkpoint_format" if settings.get("checkpoint_format") else "format", " or ".join(FORMATS))
    if settings.get("pack_dtype", "int32") != "int32":
        refuse("pack_dtype", '"int32"')
    if not isinstance(settings.get("sym", True), bool):
        refuse("sym", "true or false")
    if not isinstance(settings.get("dynamic") or {}, dict):
        refuse("dynamic", "an object")
    return form


def is_quantized(folder: Path) -> bool:
    """Whether the checkpoint in `folder` is quantized. Raises UhdError where `build` could not read it."""
    settings = quantization_settings(folder)
    if settings is not None:
        check_settings(folder, settings)
    return settings is not None
