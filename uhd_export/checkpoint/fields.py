"""Fields of a JSON configuration and options of a call: read with their type, refused by name."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from uhd_export.runtime import json_files
from uhd_export.runtime.choices import LARGEST_SIZE
from uhd_export.runtime.errors import UhdError

Kind = type | tuple[type, ...]


def read_json(path: Path) -> dict:
    """A JSON object from `path`; UhdError names the file where it is missing or broken."""
    try:
        value = json_files.read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UhdError(f"{path}: no such file") from None
    if not isinstance(value, dict):
        raise UhdError(f"{path}: must hold a JSON object")
    return value


def optional(config: dict, field: str, kind: Kind, default: Any, where: str = "config") -> Any:
    """The value of `field`, `default` where it is missing or null. A bool is no number here."""
    value = config.get(field)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UhdError(f"{where} field {field}: {shown(value)} has the wrong type")
    return value


def required(config: dict, field: str, kind: Kind, where: str = "config") -> Any:
    """The value of `field`; UhdError where it is missing, null or of another type."""
    if config.get(field) is None:
        raise UhdError(f"{where} field {field}: missing; is this a LLaVA-UHD v2 checkpoint?")
    return optional(config, field, kind, None, where)


def size(config: dict, field: str, default: int | None = None, where: str = "config") -> int:
    """A whole number above zero, and no larger than a model can be; required where there is no `default`."""
    if default is None:
        value = required(config, field, int, where)
    else:
        value = optional(config, field, int, default, where)
    if value < 1:
        raise UhdError(f"{where} field {field}: {value} must be above zero")
    if value > LARGEST_SIZE:
        raise UhdError(f"{where} field {field}: {value:.3g} is more than any model has; is the file damaged?")
    return value


def positive(config: dict, field: str, default: float | None = None, where: str = "config") -> float:
    """A finite number above zero; required where there is no `default`."""
    kinds = (int, float)
    if default is None:
        value = required(config, field, kinds, where)
    else:
        value = optional(config, field, kinds, default, where)
    if not 0 < value < 1e300:
        raise UhdError(f"{where} field {field}: {value} must be a finite number above zero")
    return float(value)


def choice(name: str, value: object, allowed: Iterable[object]) -> None:
    """Raise UhdError where option `name` is not one of those `allowed`; None among them goes unsaid."""
    if value not in allowed:
        names = ", ".join(str(a) for a in allowed if a is not None)
        raise UhdError(f"{name} {value!r}: must be one of {names}")


def shown(value: object) -> str:
    """`value` as it can be shown in one line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
