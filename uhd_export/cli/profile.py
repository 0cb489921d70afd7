"""The command `profile`."""

from pathlib import Path

import click

from uhd_export.cli.command import Command, concern, option
from uhd_export.cli.options import COUNT, PipelineOptions, bundle_argument, json_option, machine_options
from uhd_export.runtime.choices import GRID_MODES


@click.command(cls=Command)
@bundle_argument
@option("--size", default="1008x672", metavar="WIDTHxHEIGHT", help="Image size.")
@option("--repeats", default=5, type=COUNT, metavar="N", help="Measured runs of each grid mode.")
@option("--tokens", default=16, type=COUNT, metavar="N", help="Tokens decoded in each run.")
@option(
    "--grid",
    "grid_modes",
    multiple=True,
    type=click.Choice(GRID_MODES),
    help="Repeatable; default: all three.",
)
@concern("opening", PipelineOptions, *machine_options)
@json_option
def profile(
    bundle: Path,
    size: str,
    repeats: int,
    tokens: int,
    grid_modes: tuple[str, ...],
    opening: PipelineOptions,
    as_json: bool,
) -> None:
    """Time BUNDLE by stage and grid mode, next to the paper's figures."""
    from uhd_export.runtime.image.pixels import source_size
    from uhd_export.runtime.profiling import profiler
    from uhd_export.runtime.progress import progress_bar
    from uhd_export.runtime.terminal import profile_report
    from uhd_export.runtime.terminal.report import print_json

    modes = grid_modes or GRID_MODES
    steps = profiler.steps(modes, repeats)
    with opening.open(bundle) as pipeline, progress_bar("profile", steps) as bar:
        measured = profiler.profile_pipeline(
            pipeline,
            source_size(size),
            grid_modes=modes,
            repeats=repeats,
            new_tokens=tokens,
            device=opening.device,
            threads=opening.threads,
            on_step=bar.advance,
        )
    if as_json:
        print_json(profile_report.describe_profile(measured))
    else:
        profile_report.print_profile(measured)
