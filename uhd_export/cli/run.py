"""The command `run`."""

from dataclasses import asdict, dataclass
from pathlib import Path

import click

from uhd_export.cli.command import Command, concern, option
from uhd_export.cli.opening import PipelineOptions, pipeline_options
from uhd_export.cli.options import COUNT, bundle_argument

ANSWER = "Answer"


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen; None is as the bundle says."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None


@click.command(cls=Command)
@bundle_argument
@click.argument("image", metavar="IMAGE")
@click.argument("question", required=False)
@option("--image", "more", multiple=True, metavar="IMAGE", help="A further image.")
@option(
    "--max-new-tokens",
    "tokens",
    default=256,
    type=COUNT,
    metavar="N",
    help="Longest answer.",
    section=ANSWER,
)
@concern(
    "sampling",
    SamplingOptions,
    option(
        "--temperature",
        type=click.FloatRange(0),
        metavar="T",
        help="0 takes the likeliest token; default: the bundle's, mostly 0.",
        section=ANSWER,
    ),
    option(
        "--top-k",
        type=click.IntRange(0),
        metavar="K",
        help="Sample among the k likeliest; 0 means all.",
        section=ANSWER,
    ),
    option(
        "--top-p",
        type=click.FloatRange(0, 1, min_open=True),
        metavar="P",
        help="Sample among tokens that make up this share.",
        section=ANSWER,
    ),
    option("--seed", type=click.IntRange(0), metavar="N", help="Makes sampling repeatable.", section=ANSWER),
)
@pipeline_options
def run(
    bundle: Path,
    image: str,
    question: str | None,
    more: tuple[str, ...],
    tokens: int,
    sampling: SamplingOptions,
    opening: PipelineOptions,
) -> None:
    """Ask BUNDLE about IMAGE, a path, an address or a data URI; without QUESTION, ask several in a row."""
    from uhd_export.runtime.image.source import open_image
    from uhd_export.runtime.progress import status
    from uhd_export.runtime.terminal.chat import answer, chat

    with status("opening the image"):
        images = [open_image(path) for path in (image, *more)]
    with opening.open(bundle) as pipeline:
        chosen = pipeline.settings.sampling.changed(**asdict(sampling))
        if question is None:
            chat(pipeline, images, tokens=tokens, sampling=chosen)
        else:
            with status("cutting the image"):
                conversation = pipeline.converse(images)
            answer(pipeline, conversation, question, tokens=tokens, sampling=chosen)
