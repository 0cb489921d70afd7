"""The command `eval`."""

from dataclasses import asdict
from pathlib import Path

import click

from uhd_export.cli.command import Command, option
from uhd_export.cli.options import COUNT, PipelineOptions, bundle_argument, json_option, pipeline_options


@click.command("eval", cls=Command)
@bundle_argument
@option("--count", default=200, type=COUNT, metavar="N", help="Held-out images.")
@pipeline_options
@json_option
def evaluate(bundle: Path, count: int, opening: PipelineOptions, as_json: bool) -> None:
    """Measure exact answers on images of cards with codes, which nano was trained to read."""
    from uhd_export.nano.evaluate import evaluate as ask_all
    from uhd_export.runtime.progress import progress_bar
    from uhd_export.runtime.terminal import report

    with opening.open(bundle) as pipeline, progress_bar("questions", count) as bar:
        result = ask_all(
            lambda image, question: "".join(pipeline.generate(image, question, max_new_tokens=16)),
            count,
            progress=bar.set,
        )
    if as_json:
        report.print_json({"bundle": str(bundle), "accuracy": result.accuracy, **asdict(result)})
        return
    click.echo(f"{result.exact} of {result.total} answers exact: {result.accuracy:.1%}")
    for miss in result.misses[:5]:
        click.echo(f"  image {miss.index}: {miss.question} {miss.expected}, answered {miss.got!r}")
