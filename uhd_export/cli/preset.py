"""--preset: defaults of other options."""

from collections.abc import Callable
from dataclasses import fields

import click
from click.core import ParameterSource

from uhd_export.bundle.presets import PRESETS, Preset, adapted
from uhd_export.cli.command import option
from uhd_export.cli.options import WEIGHT


def _fill_defaults(context: click.Context, _: click.Parameter, name: str | None) -> str | None:
    if name is not None:

        def default(field: str) -> Callable[[], str | None]:
            return lambda: getattr(_adapted(context, name)[0], field)  # called after what is given is known

        context.default_map = {field.name: default(field.name) for field in fields(Preset)}
    return name


def _adapted(context: click.Context, name: str) -> tuple[Preset, dict[str, str]]:
    return adapted(name, context.params.get("backend") or "onnxruntime", context.params.get("dtype"))


def preset_notes(context: click.Context, name: str) -> list[str]:
    """What preset `name` cannot be here, a line each; what was asked for explicitly aside."""
    return [
        f"--preset {name}: {reason}"
        for field, reason in _adapted(context, name)[1].items()
        if context.get_parameter_source(field) == ParameterSource.DEFAULT_MAP
    ]


preset_option = option(
    "--preset",
    type=click.Choice(tuple(PRESETS)),
    is_eager=True,
    callback=_fill_defaults,
    help="Other defaults: float32 throughout, int4 with int8, or the fewest bits.",
    section=WEIGHT,
)
