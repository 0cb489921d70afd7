"""The command `build`, which quantizes first where the weights asked for need it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click

from uhd_export.bundle.options import BuildOptions
from uhd_export.calibration.options import CalibrationOptions, GptqOptions, QuantizeOptions
from uhd_export.cli.command import Command, concern, option
from uhd_export.cli.given import refuse_given
from uhd_export.cli.options import (
    COUNT,
    ENGINES,
    OUTPUT,
    WEIGHT,
    calibration_options,
    checkpoint_argument,
    engine_options,
    image_options,
    output_option,
    source_options,
    weight_options,
)
from uhd_export.cli.preset import preset_notes, preset_option
from uhd_export.cli.quantize import quantize_into
from uhd_export.graph.int4.options import AUTO
from uhd_export.graph.int8.options import VISION_WEIGHTS
from uhd_export.runtime.choices import CACHES, DTYPES

# About a minute of one core, where the 200 of `quantize` take four.
_QUESTIONS = 50
# Of the bundle, where anything in it is rounded: PyTorch answers them too, a second each.
_CHECKED = 20
# Of 8-bit vision and cache: each is many crops of thousands of patches, and a thousand positions.
_PAIRS = 4
# The options of calibration that say which these are.
_CHOOSING = {"data", "image_root", "seed"}


@click.command(cls=Command)
@checkpoint_argument
@output_option
@option("--verify/--no-verify", default=True, help="Measure parity with PyTorch.", section=OUTPUT)
@option("--force", is_flag=True, help="Replace an existing bundle.", section=OUTPUT)
@source_options
@image_options
@preset_option
@weight_options
@concern("calibration", CalibrationOptions, *calibration_options)
@engine_options
@concern(
    "options",
    BuildOptions,
    option("--fold/--no-fold", default=True, help="Fold the projector exactly.", section=WEIGHT),
    option("--inline", is_flag=True, help="No functions in the graphs, as OpenVINO needs.", section=WEIGHT),
    option(
        "--vision-weights",
        default="dense",
        type=click.Choice(VISION_WEIGHTS),
        help="Of the vision part's dense products; int8 rounds activations too.",
        section=WEIGHT,
    ),
    option(
        "--dtype",
        type=click.Choice(DTYPES),
        help="Default: float32 with onnxruntime, else float16.",
        section=ENGINES,
    ),
    option(
        "--cache",
        type=click.Choice(CACHES),
        help="Of keys and values; default: as --dtype. int8 is calibrated.",
        section=ENGINES,
    ),
    option(
        "--context",
        type=COUNT,
        metavar="N",
        help="Positions of the KV cache; default: the model's.",
        section=ENGINES,
    ),
)
def build(
    source: str,
    output: Path,
    options: BuildOptions,
    calibration: CalibrationOptions,
    preset: str | None,
    verify: bool,
    force: bool,
) -> None:
    """Build a bundle from CHECKPOINT: a folder, a Hugging Face hub id, or nano."""
    from uhd_export.checkpoint.source import source_folder
    from uhd_export.runtime.progress import overall_bar, status

    folder = source_folder(source, options.reading.revision)  # a download has a bar of its own
    with status("loading PyTorch"):  # which takes seconds
        from uhd_export.bundle.build import build_bundle
        from uhd_export.bundle.cost import Cost, cost_lines
        from uhd_export.bundle.stages import expected_seconds, gptq_units
        from uhd_export.bundle.staging import require_room
        from uhd_export.calibration.data import calibration_pairs
        from uhd_export.calibration.quantize import work_folder
        from uhd_export.runtime.terminal.bundle_report import print_parity, total_bytes
        from uhd_export.runtime.units import format_bytes

    for note in preset_notes(click.get_current_context(), preset) if preset else ():
        click.echo(note, err=True)
    _refuse_ineffective(folder, options, calibration, verify)
    quantize = _quantizer(source, folder, output, options, calibration)
    options = replace(options, questions=_questions(source, calibration))

    def tell(cost: Cost) -> None:
        folder = _gptq_folder(output)
        if folder.exists():  # and is taken as it is, or refused
            cost = replace(cost, checkpoint=0)
        asked = _gptq_questions(source, calibration) or 0
        units = gptq_units(cost.sizes, images=calibration.pairs, samples=calibration.samples, questions=asked)
        for line in cost_lines(cost, options, sum(expected_seconds(units).values()), str(folder)):
            click.echo(line, err=True)
        begun = work_folder(folder).exists()  # what it holds becomes the checkpoint
        require_room(output, cost.staging + (0 if begun else cost.checkpoint))

    with overall_bar("build"):
        manifest = build_bundle(
            source,
            output,
            options=options,
            quantize=quantize,
            pairs=lambda: calibration_pairs(calibration, _PAIRS),
            verify=verify,
            on_cost=tell,
            force=force,
            progress=True,
        )
    print_parity(manifest.parity)
    click.echo(f"{output}: {len(manifest.files)} files, {format_bytes(total_bytes(manifest))}")


def _refuse_ineffective(
    found: Path, options: BuildOptions, calibration: CalibrationOptions, verify: bool
) -> None:
    """Raise UhdError for a given option that changes nothing of what is built or measured."""
    from uhd_export.checkpoint.int4.settings import is_quantized

    weights = options.weights
    packed = weights.weights in ("int4", "int4-rtn") or weights.lm_head not in (AUTO, "dense")
    if options.engines is not None:
        refuse_given({"activations"}, "is for --backend onnxruntime; engines have activations of --dtype")
    elif not (packed or (weights.weights == AUTO and is_quantized(found))):
        refuse_given({"activations"}, "is for integer weights; give it with --weights int4 or int4-rtn")
    if not verify and calibration.questions and weights.weights != "int4":
        refuse_given({"questions"}, "is asked where parity is measured; leave --no-verify out")


def _questions(source: str, calibration: CalibrationOptions) -> int:
    """How many questions the bundle is asked, where anything in it is rounded."""
    from uhd_export.checkpoint.source import NANO

    if source != NANO:
        return 0
    return _CHECKED if calibration.questions is None else calibration.questions


def _quantizer(
    source: str, found: Path, output: Path, options: BuildOptions, calibration: CalibrationOptions
) -> Callable[[], Path] | None:
    """What makes the checkpoint that `build --weights int4` needs; None where `source` is built as it is.

    `source` was found in the folder `found`. What is made stays beside the bundle, as OUTPUT-gptq, and is
    taken again where it was made of the same.
    """
    from uhd_export.checkpoint.int4.settings import is_quantized
    from uhd_export.checkpoint.source import NANO

    calibrated = "int8" in (options.vision_weights, options.cache)
    unused = CalibrationOptions.__dataclass_fields__.keys() - (_CHOOSING if calibrated else set())
    if source == NANO and _rounds(options):
        unused -= {"questions"}
    if options.weights.weights != "int4":
        others = "" if calibrated else ", --vision-weights int8 or --cache int8"
        refuse_given(unused, f"is for calibration; give it with --weights int4{others}")
        return None
    if is_quantized(found):
        refuse_given(unused, f"checkpoint {source} is quantized already; leave it out")
        return None
    calibration = replace(calibration, questions=_gptq_questions(source, calibration))
    gptq = GptqOptions(group=options.weights.group)
    chosen = QuantizeOptions(options.reading, options.images, calibration, gptq)
    folder = _gptq_folder(output)

    def quantize() -> Path:
        if not folder.exists():
            click.echo(f"quantizing into {folder} first", err=True)
        quantize_into(source, folder, chosen, reuse=True)
        return folder

    return quantize


def _gptq_questions(source: str, calibration: CalibrationOptions) -> int | None:
    """How many questions GPTQ's models are asked."""
    from uhd_export.checkpoint.source import NANO

    return _QUESTIONS if calibration.questions is None and source == NANO else calibration.questions


def _rounds(options: BuildOptions) -> bool:
    """Whether anything of the bundle is rounded, beside what GPTQ does."""
    weights = options.weights
    return weights.weights == "int4-rtn" or weights.lm_head not in (AUTO, "dense") or options.rounded


def _gptq_folder(output: Path) -> Path:
    """OUTPUT-gptq; `.` is called as the folder that it is."""
    named = output if output.name else output.absolute()
    return named.with_name(f"{named.name}-gptq")
