"""The command `batch`."""

from pathlib import Path

import click

from uhd_export.cli.command import Command, option
from uhd_export.cli.options import COUNT, PipelineOptions, bundle_argument, pipeline_options
from uhd_export.cli.serving import SlotOptions, slot_options

_PATH = click.Path(path_type=Path)


@click.command(cls=Command)
@bundle_argument
@click.argument("questions", type=_PATH)
@option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="JSONL to write, or go on with."
)
@option("--max-new-tokens", "tokens", default=256, type=COUNT, metavar="N", help="Longest answer.")
@option(
    "--image-root", type=click.Path(path_type=Path), help="Where paths start; default: the file's folder."
)
@option("--retry", is_flag=True, help="Ask again what failed before.")
@slot_options
@pipeline_options
def batch(
    bundle: Path,
    questions: Path,
    output: Path,
    tokens: int,
    image_root: Path | None,
    retry: bool,
    slots: SlotOptions,
    opening: PipelineOptions,
) -> None:
    """Answer the JSONL file QUESTIONS, all slots busy; given again, it goes on where it stopped."""
    from uhd_export.runtime.progress import progress_bar
    from uhd_export.runtime.serving.batch import BatchOptions, answer_file

    options = BatchOptions(max_tokens=tokens, image_root=image_root, retry=retry)
    with slots.open(bundle, opening) as service, progress_bar("answers") as bar:
        result = answer_file(service, questions, output, options, bar.set)
    before = f", {result.before} of them before" if result.before else ""
    failed = f"; {result.failed} failed, see their errors, and --retry" if result.failed else ""
    click.echo(f"{output}: {result.answered + result.failed} lines{before}{failed}")
