"""The command `plan`."""

import click

from uhd_export.checkpoint.options import ImageOptions
from uhd_export.cli.command import Command, concern
from uhd_export.cli.options import json_option, slicing_options


@click.command(cls=Command)
@click.argument("source", metavar="WIDTHxHEIGHT|IMAGE", type=click.Path())
@concern("images", ImageOptions, *slicing_options)
@json_option
def plan(source: str, images: ImageOptions, as_json: bool) -> None:
    """Show how an image is cut, its tokens, and what it costs."""
    from uhd_export.runtime.image.slicing import plan_slices
    from uhd_export.runtime.image.source import source_size
    from uhd_export.runtime.progress import status
    from uhd_export.runtime.terminal import report

    with status("opening the image"):
        size = source_size(source)
    slices = plan_slices(size, max_slices=images.max_slices, resize=images.resize)
    facts = report.describe_plan(slices, grid_mode=images.grid_mode)
    if as_json:
        report.print_json(facts)
    else:
        report.print_plan(facts)
