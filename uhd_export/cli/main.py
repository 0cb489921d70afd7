"""The command line: one group, thin commands, and the place where errors become one line."""

import signal
import sys

if (
    sys.argv[0].endswith(("uhd-export", "cli.py", "__main__.py"))
    and signal.getsignal(signal.SIGINT) != signal.SIG_IGN
):
    # The imports below take a moment: until `main` can tell of it, Ctrl-C ends this process without a word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from uhd_export.cli.batch import batch
from uhd_export.cli.build import build
from uhd_export.cli.check import check
from uhd_export.cli.command import Command, debug_option
from uhd_export.cli.eval import evaluate
from uhd_export.cli.inspect import inspect
from uhd_export.cli.plan import plan
from uhd_export.cli.profile import profile
from uhd_export.cli.quantize import quantize
from uhd_export.cli.run import run
from uhd_export.cli.serve import serve
from uhd_export.runtime.errors import explain
from uhd_export.runtime.interrupts import handle_interrupts, was_interrupt
from uhd_export.runtime.terminal.streams import print_anything

DEFECT, FAILED, INTERRUPTED = 1, 2, 130
STOPPED = "interrupted; no unfinished output is left (quantizing goes on when the command is given again)"


class OneLineErrors(click.Group):
    """A group whose failures end in one line on stderr; a traceback with --debug."""

    command_class = Command

    def __init__(self, *arguments: Any, **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.params.append(debug_option())

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> NoReturn:
        """Run, and exit with 0, 1 (a defect of the program), 2 (failed) or 130 (interrupted)."""
        args = sys.argv[1:] if args is None else list(args)
        line: str | None
        try:
            handle_interrupts()
            print_anything()
            code = super().main(args, prog_name or self.name, complete_var, standalone_mode=False, **extra)
            sys.exit(code if isinstance(code, int) else 0)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.ctx.get_help() if error.ctx else "")
            sys.exit(0)
        except (click.Abort, KeyboardInterrupt):
            line, code = STOPPED, INTERRUPTED
        except click.ClickException as error:
            context: click.Context | None = getattr(error, "ctx", None)
            hint = f"; see `{context.command_path} --help`" if context else ""
            line, code = " ".join(error.format_message().split()).rstrip(".") + hint, FAILED
        except Exception as error:
            line, code = (STOPPED, INTERRUPTED) if was_interrupt(error) else (explain(error), FAILED)
            if line is None or "--debug" in args:
                traceback.print_exc()
            if line is None:
                line = f"this is a defect of the program, please report it ({type(error).__name__}: {error})"
                code = DEFECT
        click.echo(f"error: {line}", err=True)
        sys.exit(code)

    def invoke(self, context: click.Context) -> Any:
        """Run the command that was named; see `main`."""
        try:
            return super().invoke(context)
        except KeyboardInterrupt:
            if sys.stderr.isatty():
                raise  # click ends the line on which the terminal shows ^C
            raise click.Abort from None


@click.group(
    "uhd-export",
    cls=OneLineErrors,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.version_option(package_name="uhd-export")
def main() -> None:
    """Export LLaVA-UHD v2 to engines for one GPU, and run them."""


for command in (build, quantize, run, serve, batch, plan, inspect, check, evaluate, profile):
    main.add_command(command)
