"""Commands whose help lists their options by section, and whose options arrive as dataclasses."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import click

Decorator = Callable[[Callable], Callable]


class Option(click.Option):
    """An option that help lists under `section`."""

    def __init__(self, *names: Any, section: str = "Options", **attributes: Any) -> None:
        super().__init__(*names, **attributes)
        self.section = section


class Command(click.Command):
    """A command that takes --debug, as the group does."""

    def __init__(self, *arguments: Any, **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.params.append(debug_option())

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options section by section, in the order in which they are declared."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(context):
            record = parameter.get_help_record(context) if isinstance(parameter, click.Option) else None
            if record is not None:
                sections.setdefault(getattr(parameter, "section", "Options"), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def debug_option() -> click.Option:
    """--debug; the group looks for it among the arguments."""
    return Option(["--debug"], is_flag=True, expose_value=False, help="Show the traceback of an error.")


def option(*names: str, **attributes: Any) -> Decorator:
    """`click.option` with a `section`."""
    return click.option(*names, cls=Option, **attributes)


def concern(name: str, make: Callable[..., object], *options: Decorator) -> Decorator:
    """A decorator: what `options` gave, and other values that `make` takes, reach the command as `name`."""

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def gathered(**values: Any) -> Any:
            own = inspect.signature(make).parameters.keys() & values.keys()
            rest = {key: value for key, value in values.items() if key not in own}
            return command(**rest, **{name: make(**{key: values[key] for key in own})})

        return functools.reduce(lambda function, option: option(function), reversed(options), gathered)

    return decorate
