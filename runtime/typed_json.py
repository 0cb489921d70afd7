"""Strict reading of JSON into typed dataclasses: every field present, known and of its type."""

import dataclasses
import types
import typing
from typing import Any, TypeVar, cast

from uhd_export.runtime.errors import UhdError, printable

T = TypeVar("T")


def read(kind: type[T], value: object, where: str) -> T:
    """`value`, as `json.loads` returned it, as an instance of the dataclass `kind`.

    Supports nested dataclasses, `tuple[X, ...]`, `tuple[X, Y]`, `dict[str, X]`, `X | None`, str,
    int, float and bool; an integer is accepted where a float is due, a boolean never as a number.
    Raises UhdError naming the first field that is missing, unknown or of another type.
    """
    if not isinstance(value, dict):
        raise UhdError(f"{where}: must be a JSON object")
    fields = [field.name for field in dataclasses.fields(cast(Any, kind))]
    hints = typing.get_type_hints(kind)
    for name in value:
        if name not in fields:
            raise UhdError(f"{where}.{name}: unknown field")
    arguments = {}
    for name in fields:
        if name not in value:
            raise UhdError(f"{where}.{name}: field is missing")
        arguments[name] = _convert(hints[name], value[name], f"{where}.{name}")
    return kind(**arguments)


def _convert(hint: Any, value: object, where: str) -> object:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return read(hint, value, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _convert(inner, value, where)
    if origin is tuple:
        return _convert_tuple(arguments, value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong(where, "an object", value)
        for key in value:
            _check_text(key, where)
        return {key: _convert(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise _wrong(where, hint.__name__, value)
    if isinstance(value, str):
        _check_text(value, where)
    return value


def _convert_tuple(arguments: tuple[Any, ...], value: object, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _wrong(where, "a list", value)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(arguments) != len(value):
        raise _wrong(where, f"a list of {len(arguments)}", value)
    pairs = zip(arguments, value, strict=True)
    return tuple(_convert(hint, item, f"{where}[{i}]") for i, (hint, item) in enumerate(pairs))


def _check_text(text: str, where: str) -> None:
    """Raise UhdError where a terminal would obey `text` in place of showing it."""
    if "\n" in text or printable(text) != text:
        raise UhdError(f"{where}: {text[:40]!r} holds control characters")


def _wrong(where: str, expected: str, value: object) -> UhdError:
    return UhdError(f"{where}: expected {expected}, found {type(value).__name__}")
