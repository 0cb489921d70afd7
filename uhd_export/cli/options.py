"""The options that commands share; each concern reaches a command as the dataclass of its room."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from uhd_export.calibration.options import MIN_SAMPLES, CalibrationOptions
from uhd_export.checkpoint.options import MASKS, ImageOptions, SourceOptions
from uhd_export.cli.command import concern, option
from uhd_export.graph.int4.options import ACTIVATIONS, AUTO, WEIGHTS, WeightOptions
from uhd_export.runtime.choices import (
    BACKENDS,
    DTYPES,
    GRID_MODES,
    GROUP_SIZES,
    HEADS,
    LARGEST_SIZE,
    LAYOUTS,
    ROI_ROUNDINGS,
    TEMPLATE_ALIASES,
    TEMPLATES,
)
from uhd_export.runtime.engines.device import parse_device
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.slicing import MAX_SLICES

if TYPE_CHECKING:
    from uhd_export.tensorrt.options import EngineOptions

SOURCE, IMAGES, WEIGHT, CALIBRATION = "Source", "Images", "Weights", "Calibration"
ENGINES, OUTPUT, MACHINE = "Engines", "Output", "Machine"
COUNT = click.IntRange(1)


class _Template(click.Choice):
    """A conversation template, by the released scripts' other names too."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(super().convert(TEMPLATE_ALIASES.get(value, value), param, ctx))


class _Device(click.ParamType):
    """The name of a device."""

    name = "cpu|cuda|cuda:N"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return str(parse_device(value))
        except UhdError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(name) for name in ("cpu", "cuda") if name.startswith(incomplete)]


DEVICE = _Device()
TEMPLATE = _Template(TEMPLATES)

checkpoint_argument = click.argument("source", metavar="CHECKPOINT", type=click.Path())
bundle_argument = click.argument("bundle", type=click.Path(path_type=Path))
json_option = option("--json", "as_json", is_flag=True, help="Print JSON.")
output_option = option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder to write.",
    section=OUTPUT,
)

source_options = concern(
    "reading",
    SourceOptions,
    option(
        "--revision",
        metavar="NAME",
        help="Branch, tag or commit on the hub; default: its main branch.",
        section=SOURCE,
    ),
    option("--config", type=click.Path(), help="Replaces the checkpoint's config.json.", section=SOURCE),
    option(
        "--vision-tower",
        type=click.Path(),
        metavar="PATH|ID",
        help="Replaces the config's mm_vision_tower.",
        section=SOURCE,
    ),
    option(
        "--layout", type=click.Choice(LAYOUTS), help="Default: by the checkpoint's release.", section=SOURCE
    ),
    option(
        "--mask",
        type=click.Choice(MASKS),
        help="feature_scale_mask; default: the config's.",
        section=SOURCE,
    ),
    option(
        "--template",
        type=TEMPLATE,
        help="How questions are put; default: by the language model.",
        section=SOURCE,
    ),
)

slicing_options = (
    option(
        "--grid",
        "grid_mode",
        default="selective",
        type=click.Choice(GRID_MODES),
        help="Windows of the features.",
        section=IMAGES,
    ),
    option(
        "--max-slices",
        default=MAX_SLICES,
        type=COUNT,
        metavar="N",
        help="Most slices; 1 means the overview only.",
        section=IMAGES,
    ),
    option(
        "--resize",
        type=COUNT,
        metavar="N",
        help="Longest side before slicing; default: as it is.",
        section=IMAGES,
    ),
)
image_options = concern(
    "images",
    ImageOptions,
    *slicing_options,
    option(
        "--boxes",
        "roi_rounding",
        default="exact",
        type=click.Choice(ROI_ROUNDINGS),
        help="Of the windows' boxes; bf16 is as the released code.",
        section=IMAGES,
    ),
)

group_option = option(
    "--group-size",
    "group",
    type=click.Choice(GROUP_SIZES),
    help="Inputs a scale; default: the largest that fits.",
    section=WEIGHT,
)
weight_options = concern(
    "weights",
    WeightOptions,
    option(
        "--weights",
        default="auto",
        type=click.Choice(WEIGHTS),
        help="Of the language model's linear layers.",
        section=WEIGHT,
    ),
    option(
        "--lm-head",
        default=AUTO,
        type=click.Choice((AUTO, *HEADS)),
        help="The language model's head; auto is int8 beside int4 weights.",
        section=WEIGHT,
    ),
    option(
        "--activations",
        default="int8",
        type=click.Choice(tuple(ACTIVATIONS)),
        help="Of int4 products.",
        section=WEIGHT,
    ),
    group_option,
)

calibration_options = (
    option(
        "--data",
        type=click.Path(),
        help="JSONL of images and questions; default: card images.",
        section=CALIBRATION,
    ),
    option(
        "--image-root",
        type=click.Path(),
        help="Where its paths start; default: its folder.",
        section=CALIBRATION,
    ),
    option(
        "--samples",
        default=CalibrationOptions.samples,
        type=click.IntRange(MIN_SAMPLES),
        metavar="N",
        help="Sequences to calibrate on.",
        section=CALIBRATION,
    ),
    option(
        "--length",
        default=CalibrationOptions.length,
        type=COUNT,
        metavar="N",
        help="Most positions of a sequence.",
        section=CALIBRATION,
    ),
    option(
        "--seed",
        default=CalibrationOptions.seed,
        type=click.IntRange(0),
        metavar="N",
        help="Chooses the pairs.",
        section=CALIBRATION,
    ),
    option(
        "--eval",
        "questions",
        type=click.IntRange(0),
        metavar="N",
        help="Questions to nano before and after; default: 50 in build, 200 in quantize, else none.",
        section=CALIBRATION,
    ),
)


def _engines(
    backend: str,
    compute_capabilities: Sequence[str],
    plugins: bool,
    workspace: int | None,
    attention_accumulation: str,
) -> "EngineOptions | None":
    from uhd_export.tensorrt.engines import engine_options

    return engine_options(backend, compute_capabilities, plugins, workspace, attention_accumulation)


engine_options = concern(
    "engines",
    _engines,
    option(
        "--backend",
        default="onnxruntime",
        type=click.Choice(BACKENDS),
        help="What runs the bundle.",
        section=ENGINES,
    ),
    option(
        "--compute-capability",
        "compute_capabilities",
        multiple=True,
        metavar="X.Y",
        help="GPU to build engines for, such as 8.6; repeatable; default: 8.0, 8.6, 8.9 and 12.0.",
        section=ENGINES,
    ),
    option("--plugins/--no-plugins", default=True, help="Engines with our own kernels.", section=ENGINES),
    option(
        "--workspace",
        type=click.IntRange(1, LARGEST_SIZE),
        metavar="MIB",
        help="Scratch memory of engine layers.",
        section=ENGINES,
    ),
    option(
        "--attention-accumulation",
        default="float32",
        type=click.Choice(DTYPES),
        help="In which type an engine's attention adds up.",
        section=ENGINES,
    ),
)
