"""The command `quantize`, and quantizing on the way of `build`. Heavy imports wait until they run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from uhd_export.runtime.errors import UhdError


def several(*options: Callable) -> Callable:
    """Several click options as one decorator."""

    def decorate(command: Callable) -> Callable:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_calibration = (
    click.option("--data", type=click.Path(), help="JSONL of images and questions; default: card images."),
    click.option("--image-root", type=click.Path(), help="Where its paths start; default: its folder."),
    click.option("--samples", default=32, show_default=True, help="Sequences to calibrate on."),
    click.option("--length", default=2048, show_default=True, help="Most positions of a sequence."),
    click.option("--seed", default=0, show_default=True, help="Chooses the pairs."),
    click.option("--group-size", "group", type=int, help="32, 64 or 128; default: the largest that fits."),
)
_stored = (
    click.option("--weights", default="auto", show_default=True, help="auto, dense, int4 or int4-rtn."),
    click.option("--lm-head", default="dense", show_default=True, help="dense, int8 or int4."),
    click.option("--activations", default="int8", show_default=True, help="Of int4 products: int8 or float."),
)
# The default of `build --eval`: about a minute of one core, where the 200 of `quantize` take four.
_QUESTIONS = 50
_eval = click.option("--eval", "questions", type=int, help="Questions to nano; default: 50, else none.")
weight_options = several(*_stored, *_calibration, _eval)
# How images are cut and laid out, by default as the checkpoint says.
image_options = several(
    click.option("--layout", help="flat or merged; default: by the checkpoint's release."),
    click.option("--mask", type=int, help="feature_scale_mask; default: the config's."),
    click.option(
        "--grid", "grid_mode", default="selective", show_default=True, help="selective, fix or pyramid."
    ),
    click.option("--max-slices", default=9, show_default=True, help="Most slices of an image."),
    click.option("--resize", type=int, metavar="N", help="Longest side before slicing; default: as it is."),
    click.option(
        "--boxes",
        "roi_rounding",
        default="exact",
        show_default=True,
        help="exact, or bf16 as the released code.",
    ),
    click.option("--vision-tower", metavar="PATH|ID", help="Replaces the config's mm_vision_tower."),
    click.option("--config", type=click.Path(), help="Replaces the checkpoint's config.json."),
)


@click.command()
@click.argument("source", metavar="CHECKPOINT")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@several(*_calibration)
@click.option("--held-out", default=8, show_default=True, help="Further sequences, to judge by.")
@click.option("--batch", default=1, show_default=True, type=click.IntRange(1), help="Sequences run at once.")
@click.option("--sym/--asym", "symmetric", default=True, show_default=True, help="Zero points in the middle.")
@click.option("--desc-act", "act_order", is_flag=True, help="Quantize inputs by falling activation size.")
@click.option("--damp", default=0.05, show_default=True, help="Dampening of the Hessian.")
@click.option("--eval", "questions", type=int, help="Questions to nano; default: 200, other models none.")
@image_options
def quantize(source: str, output: Path, **options: Any) -> None:
    """Quantize CHECKPOINT's language model to int4 by GPTQ, calibrated on images.

    CHECKPOINT is a folder, a Hugging Face hub id, or nano. An interrupted run continues when the same
    command is given again.
    """
    gptq = {name: options.pop(name) for name in ("group", "symmetric", "act_order", "damp")}
    sequences = {name: options.pop(name) for name in ("samples", "held_out", "length", "seed")}
    _quantize(source, output, gptq, sequences, options)


def _quantize(source: str, output: Path, gptq: dict, sequences: dict, options: dict) -> None:
    from uhd_export.calibration.quantize import quantize as run
    from uhd_export.calibration.sequences import SequenceOptions
    from uhd_export.calibration.solver import GptqOptions
    from uhd_export.runtime.terminal.quality_report import summary_lines

    report = run(
        source,
        output,
        gptq=GptqOptions(**gptq),
        sequences=SequenceOptions(**sequences),
        progress=True,
        say=lambda line: click.echo(line, err=True),
        **options,
    )
    for line in summary_lines(report.to_json()):
        click.echo(line)
    click.echo(f"{output}: a GPTQ checkpoint; `uhd-export build {output} -o BUNDLE` builds it")


def quantizer(source: str, output: Path, options: dict[str, Any]) -> Callable[[], Path] | None:
    """What makes the checkpoint that `build --weights int4` needs; None where `source` is built as it is.

    Takes the options of calibration out of `options`. The checkpoint is kept beside the bundle, as
    OUTPUT-gptq, and taken again where it was made of the same.
    """
    calibration = {name: options.pop(name) for name in ("data", "image_root", "questions")}
    sequences = {name: options.pop(name) for name in ("samples", "length", "seed")}
    if options["weights"] != "int4":
        _refuse_given({*calibration, *sequences}, "is for calibration; give it with --weights int4")
        return None
    from uhd_export.checkpoint.int4.gptq import gptq_config
    from uhd_export.checkpoint.source import NANO, source_folder

    if gptq_config(source_folder(source)) is not None:
        _refuse_given({*calibration, *sequences}, f"checkpoint {source} is quantized already; leave it out")
        return None
    if calibration["questions"] is None and source == NANO:
        calibration["questions"] = _QUESTIONS
    gptq = {"group": options["group"]}
    options["group"] = None  # the checkpoint's own groups are built
    names = ("layout", "mask", "grid_mode", "max_slices", "resize", "roi_rounding", "vision_tower", "config")
    images = {name: options[name] for name in names}
    made = output.with_name(f"{output.name}-gptq")

    def make() -> Path:
        if not made.exists():
            click.echo(f"quantizing into {made} first", err=True)
        _quantize(source, made, gptq, sequences, {**calibration, **images, "reuse": True})
        return made

    return make


def _refuse_given(names: set[str], reason: str) -> None:
    """Raise UhdError where the command line gives one of the options `names`."""
    context = click.get_current_context()
    for option in context.command.params:
        if option.name in names and context.get_parameter_source(option.name) == ParameterSource.COMMANDLINE:
            raise UhdError(f"{option.opts[0]}: {reason}")
