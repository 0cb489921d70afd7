"""The command `eval`."""

from dataclasses import asdict
from pathlib import Path

import click

from uhd_export.cli.command import Command, option
from uhd_export.cli.given import refuse_given
from uhd_export.cli.opening import PipelineOptions, pipeline_options
from uhd_export.cli.options import COUNT, bundle_argument, json_option
from uhd_export.cli.serving import SlotOptions, slot_options
from uhd_export.runtime.errors import UhdError


@click.command("eval", cls=Command)
@bundle_argument
@option("--data", type=click.Path(path_type=Path), help="JSONL with answers; default: card images.")
@option("--image-root", type=click.Path(path_type=Path), help="Where its paths start; default: its folder.")
@option("--compare", type=click.Path(path_type=Path), metavar="BUNDLE", help="Ask another one too.")
@option("--max-new-tokens", "tokens", default=64, type=COUNT, metavar="N", help="Longest answer to --data.")
@option("--count", type=COUNT, metavar="N", help="Questions; default: all of --data, or 200 card images.")
@slot_options
@pipeline_options
@json_option
def evaluate(
    bundle: Path,
    data: Path | None,
    image_root: Path | None,
    compare: Path | None,
    tokens: int,
    count: int | None,
    slots: SlotOptions,
    opening: PipelineOptions,
    as_json: bool,
) -> None:
    """Measure answers to one's own questions, or exact ones on images of cards, which nano learnt to read."""
    if data is not None:
        _evaluate_data(bundle, data, image_root, compare, tokens, count, slots, opening, as_json)
    elif compare is not None or image_root is not None:
        raise UhdError("--compare and --image-root: need --data, the questions")
    else:
        refuse_given({"tokens", "slots", "image_cache"}, "is for --data; leave it out with card images")
        _evaluate_cards(bundle, count or 200, opening, as_json)


def _evaluate_cards(bundle: Path, count: int, opening: PipelineOptions, as_json: bool) -> None:
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


def _evaluate_data(
    bundle: Path,
    data: Path,
    image_root: Path | None,
    compare: Path | None,
    tokens: int,
    count: int | None,
    slots: SlotOptions,
    opening: PipelineOptions,
    as_json: bool,
) -> None:
    from uhd_export.runtime.bundle.manifest import read_manifest
    from uhd_export.runtime.language.pairs import read_pairs
    from uhd_export.runtime.progress import progress_bar
    from uhd_export.runtime.serving.evaluation import report
    from uhd_export.runtime.serving.evaluation.evaluate import compare as compare_two
    from uhd_export.runtime.serving.evaluation.evaluate import evaluate_pairs
    from uhd_export.runtime.terminal.report import print_json

    pairs = read_pairs(data, image_root)[:count]
    bundles = [one for one in (bundle, compare) if one is not None]
    for one in bundles:  # before hours with the first
        read_manifest(one)
    found = {}
    for one in bundles:
        with slots.open(one, opening) as service, progress_bar(one.name, len(pairs)) as bar:
            found[one] = evaluate_pairs(service, pairs, max_tokens=tokens, on_pair=bar.set)
    other = None if compare is None else found[compare]
    comparison = None if other is None else compare_two(found[bundle], other)
    if as_json:
        print_json(report.describe(bundle, found[bundle], compare, other, comparison))
    else:
        report.show(bundle, found[bundle], compare, other, comparison)
