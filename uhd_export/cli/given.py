"""Which options the command line gives, as against their defaults."""

from collections.abc import Container

import click
from click.core import ParameterSource

from uhd_export.runtime.errors import UhdError


def given_options() -> list[click.Parameter]:
    """The options of the running command that its command line gives."""
    context = click.get_current_context()
    return [
        parameter
        for parameter in context.command.params
        if isinstance(parameter, click.Option)
        and context.get_parameter_source(parameter.name or "") == ParameterSource.COMMANDLINE
    ]


def refuse_given(names: Container[str], reason: str) -> None:
    """Raise UhdError where the command line gives an option whose name is one of `names`."""
    for option in given_options():
        if option.name in names:
            raise UhdError(f"{'/'.join((*option.opts[:1], *option.secondary_opts[:1]))}: {reason}")
