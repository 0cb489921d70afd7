"""The command `quantize`."""

import shlex
from pathlib import Path

import click

from uhd_export.calibration.options import CalibrationOptions, GptqOptions, QuantizeOptions
from uhd_export.checkpoint.options import ImageOptions, SourceOptions
from uhd_export.cli.command import Command, concern, option
from uhd_export.cli.given import given_options, refuse_given
from uhd_export.cli.options import (
    CALIBRATION,
    COUNT,
    WEIGHT,
    calibration_options,
    checkpoint_argument,
    group_option,
    image_options,
    output_option,
    source_options,
)

_LANGUAGE = "a GPTQ checkpoint of the language part, for transformers' AutoModelForCausalLM and vLLM"


@click.command(cls=Command)
@checkpoint_argument
@output_option
@source_options
@image_options
@concern(
    "gptq",
    GptqOptions,
    group_option,
    option("--sym/--asym", "symmetric", default=True, help="Zero points in the middle.", section=WEIGHT),
    option(
        "--desc-act",
        "act_order",
        is_flag=True,
        help="Quantize inputs by falling activation size.",
        section=WEIGHT,
    ),
    option(
        "--damp",
        default=GptqOptions.damp,
        type=click.FloatRange(0, 1, min_open=True, max_open=True),
        metavar="SHARE",
        help="Dampening of the Hessian.",
        section=WEIGHT,
    ),
)
@concern(
    "calibration",
    CalibrationOptions,
    *calibration_options,
    option(
        "--held-out",
        default=CalibrationOptions.held_out,
        type=COUNT,
        metavar="N",
        help="Further sequences, to judge by.",
        section=CALIBRATION,
    ),
    option(
        "--batch",
        default=CalibrationOptions.batch,
        type=COUNT,
        metavar="N",
        help="Sequences run at once.",
        section=CALIBRATION,
    ),
)
@concern(
    "options",
    QuantizeOptions,
    option(
        "--language-only",
        is_flag=True,
        help="Write a plain LLaMA or Qwen2 checkpoint; CHECKPOINT may be quantized already.",
        section=WEIGHT,
    ),
)
def quantize(source: str, output: Path, options: QuantizeOptions) -> None:
    """Quantize CHECKPOINT's language model to int4 by GPTQ, calibrated on images.

    CHECKPOINT is a folder, a Hugging Face hub id, or nano. An interrupted run continues when the same
    command is given again.
    """
    from uhd_export.checkpoint.source import source_folder
    from uhd_export.runtime.progress import status

    folder = source_folder(source, options.reading.revision)  # a download has a bar of its own
    with status("loading PyTorch"):  # which takes seconds
        from uhd_export.calibration.language_part import extract_language
        from uhd_export.checkpoint.int4.settings import is_quantized

    if options.language_only and is_quantized(folder):
        allowed = {"output", "language_only", "revision", "config", "debug"}
        others = {option.name or "" for option in given_options()} - allowed
        refuse_given(others, f"checkpoint {source} is quantized already; leave it out")
        extract_language(folder, output, config=options.reading.config, progress=True)
        click.echo(f"{output}: {_LANGUAGE}")
    else:
        quantize_into(source, output, options)


def quantize_into(source: str, output: Path, options: QuantizeOptions, *, reuse: bool = False) -> None:
    """Quantize, telling what becomes of it; with `reuse` an `output` made of the same is taken as it is."""
    from uhd_export.runtime.progress import overall_bar, status

    with status("loading PyTorch"):  # which takes seconds
        from uhd_export.calibration.quantize import quantize as run
        from uhd_export.runtime.terminal.quality_report import summary_lines

    with overall_bar("quantize"):
        report = run(
            source,
            output,
            options=options,
            reuse=reuse,
            progress=True,
            say=lambda line: click.echo(line, err=True),
        )
    for line in summary_lines(report.to_json()):
        click.echo(line)
    whole = f"a GPTQ checkpoint; `uhd-export build {output} -o BUNDLE{_again()}` builds it"
    click.echo(f"{output}: {_LANGUAGE if options.language_only else whole}")


def _again() -> str:
    """The given options that the GPTQ checkpoint does not hold, for who builds it: `config` is its own."""
    names = {*SourceOptions.__dataclass_fields__, *ImageOptions.__dataclass_fields__} - {"config", "revision"}
    values = click.get_current_context().params
    given = (option for option in given_options() if option.name in names)
    return "".join(f" {option.opts[0]} {shlex.quote(str(values[option.name or '']))}" for option in given)
