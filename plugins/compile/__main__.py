"""`python -m uhd_export.plugins.compile`: the report of every kernel, as a table or as JSON."""

import json
import sys

import click

from uhd_export.plugins.compile.compiler import DTYPES, TARGETS
from uhd_export.plugins.compile.report import report
from uhd_export.runtime.errors import UhdError


@click.command()
@click.option(
    "--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES), help="Data type; all by default."
)
@click.option(
    "--target", "targets", multiple=True, type=int, help="Compute capability, as 89; all by default."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON list instead of a table.")
def main(dtypes: tuple[str, ...], targets: tuple[int, ...], as_json: bool) -> None:
    """Compile every kernel at real size and report what it uses."""
    try:
        rows = report(dtypes or DTYPES, targets or TARGETS)
    except UhdError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    if as_json:
        click.echo(json.dumps(rows))
        return
    for row in ([dict.fromkeys(rows[0])], rows):
        for line in row:
            click.echo(
                "  ".join(f"{line[k] if line[k] is not None else k!s:>{WIDTHS.get(k, 8)}}" for k in line)
            )


WIDTHS = {"op": 16, "kernel": 15, "sm": 4, "registers": 9, "ptx_bytes": 9}

if __name__ == "__main__":
    main()
