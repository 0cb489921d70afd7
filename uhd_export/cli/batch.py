"""The command `batch`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from uhd_export.cli.command import Command, option
from uhd_export.cli.opening import PipelineOptions, pipeline_options
from uhd_export.cli.options import COUNT, bundle_argument
from uhd_export.cli.serving import SlotOptions, share, slot_options

if TYPE_CHECKING:
    from uhd_export.runtime.serving.batch.file import BatchOptions, BatchResult

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
@option("--cluster", type=COUNT, metavar="N", help="Answer on N devices of a Ray cluster.")
@slot_options
@pipeline_options
def batch(
    bundle: Path,
    questions: Path,
    output: Path,
    tokens: int,
    image_root: Path | None,
    retry: bool,
    cluster: int | None,
    slots: SlotOptions,
    opening: PipelineOptions,
) -> None:
    """Answer the JSONL file QUESTIONS, all slots busy; given again, it goes on where it stopped."""
    from uhd_export.runtime.progress import progress_bar
    from uhd_export.runtime.serving.batch.file import BatchOptions, answer_file, check_output

    check_output(questions, output)
    options = BatchOptions(max_tokens=tokens, image_root=image_root, retry=retry)
    if cluster is not None:
        result = _on_cluster(cluster, bundle, questions, output, options, slots, opening)
    else:
        with slots.open(bundle, opening) as service, progress_bar("answers") as bar:
            result = answer_file(service, questions, output, options, bar.set)
    before = f", {result.before} of them before" if result.before else ""
    failed = f"; {result.failed} failed, see their errors, and --retry" if result.failed else ""
    click.echo(f"{output}: {result.answered + result.failed} lines{before}{failed}")


def _on_cluster(
    count: int,
    bundle: Path,
    questions: Path,
    output: Path,
    options: "BatchOptions",
    slots: SlotOptions,
    opening: PipelineOptions,
) -> "BatchResult":
    from dataclasses import replace

    from uhd_export.runtime.bundle.manifest import read_manifest
    from uhd_export.runtime.pipeline import KEEP, configured
    from uhd_export.runtime.progress import progress_bar
    from uhd_export.runtime.serving.batch.file import run_digest, write_answers
    from uhd_export.runtime.serving.cluster.batch import WorkerOptions, cluster_results

    manifest, bundle, questions = read_manifest(bundle), bundle.resolve(), questions.resolve()
    if options.image_root is not None:
        options = replace(options, image_root=options.image_root.resolve())
    workers = WorkerOptions(count, slots.slots, *share(bundle, opening))
    results = cluster_results(lambda: slots.open(bundle, opening), questions, options, workers)
    settings = configured(manifest.settings, **{"resize": KEEP, **slots.slicing(opening)})
    run = run_digest(manifest, settings, opening.context or settings.context, options)
    with progress_bar("answers") as bar:
        return write_answers(questions, output, run, options.retry, results, bar.set)
