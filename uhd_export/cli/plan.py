"""The command `plan`."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from uhd_export.bundle.presets import PRESETS
from uhd_export.checkpoint.options import ImageOptions
from uhd_export.cli.command import Command, concern, option
from uhd_export.cli.given import given_options
from uhd_export.cli.options import COUNT, json_option, slicing_options
from uhd_export.runtime.errors import UhdError

if TYPE_CHECKING:
    from uhd_export.bundle.subject import Subject
    from uhd_export.runtime.image.slicing import SlicePlan

ANSWER = "An answer's memory and time"


class _Bytes(click.ParamType):
    """A number of bytes, such as 8GB or 512MiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from uhd_export.runtime.units import parse_bytes

        if isinstance(value, int):
            return value
        try:
            return parse_bytes(value)
        except UhdError as error:
            self.fail(str(error), param, ctx)


@dataclass(frozen=True)
class AnswerOptions:
    """Of which model, built how, and on what an answer is planned."""

    model: str | None = None
    preset: str | None = None
    memory: int | None = None
    device: str | None = None
    context: int | None = None
    chunk: int | None = None


@click.command(cls=Command)
@click.argument("source", metavar="WIDTHxHEIGHT|IMAGE", type=click.Path())
@concern("images", ImageOptions, *slicing_options)
@concern(
    "answer",
    AnswerOptions,
    option(
        "--model",
        metavar="NAME|CONFIG|BUNDLE",
        help="vicuna-7b, vicuna-13b, qwen2-7b, a config.json or its folder, or a bundle.",
        section=ANSWER,
    ),
    option(
        "--preset", type=click.Choice(tuple(PRESETS)), help="Of a bundle yet to be built.", section=ANSWER
    ),
    option("--memory", type=_Bytes(), metavar="8GB", help="Default: what is available.", section=ANSWER),
    option(
        "--device",
        metavar="NAME",
        help="As rtx-4090, h100 or orin, by its data sheet; default: this machine, measured.",
        section=ANSWER,
    ),
    option("--context", type=COUNT, metavar="N", help="Positions of the KV cache.", section=ANSWER),
    option("--prefill-chunk", "chunk", type=COUNT, metavar="N", help="Positions a run.", section=ANSWER),
)
@json_option
def plan(source: str, images: ImageOptions, answer: AnswerOptions, as_json: bool) -> None:
    """Show how an image is cut, its tokens, and what it costs; with --model, what an answer takes."""
    from uhd_export.runtime.image.slicing import plan_slices
    from uhd_export.runtime.image.source import source_size
    from uhd_export.runtime.progress import status
    from uhd_export.runtime.terminal import report
    from uhd_export.runtime.terminal.memory_report import print_memory

    others = replace(answer, model=None)
    if answer.model is None and others != AnswerOptions():
        given = next(name for name, value in vars(others).items() if value is not None)
        raise UhdError(f"--{given.replace('chunk', 'prefill-chunk')}: is of an answer; give --model too")
    with status("opening the image"):
        size = source_size(source)
    if answer.model is None:
        slices = plan_slices(size, max_slices=images.max_slices, resize=images.resize)
        subject = None
    else:
        from uhd_export.bundle.subject import find_subject

        subject = find_subject(answer.model)
        images = subject.images(images, {option.name or "" for option in given_options()})
        slices = subject.cut(size, images)
    facts = report.describe_plan(slices, grid_mode=images.grid_mode)
    if subject is not None:
        facts["answer"] = _answer(subject, slices, images, answer)
    if as_json:
        report.print_json(facts)
        return
    report.print_plan(facts)
    if subject is not None:
        print_memory(facts["answer"])


def _answer(
    subject: "Subject", slices: "SlicePlan", images: ImageOptions, options: AnswerOptions
) -> dict[str, Any]:
    """What an answer takes, ready for JSON."""
    from uhd_export.bundle.estimate import Question, plan_model
    from uhd_export.calibration.estimate import estimate_memory
    from uhd_export.calibration.options import CalibrationOptions
    from uhd_export.runtime.memory import available_memory
    from uhd_export.runtime.profiling.devices import Device, known_device
    from uhd_export.runtime.profiling.rates import Rates, measure_rates
    from uhd_export.runtime.progress import status

    source: Device | Rates | None
    subject.check(options.device, options.context)
    if options.device is None:
        with status("measuring this machine"):
            source = measure_rates("onnxruntime", "cpu", None)
        memory = options.memory or available_memory()
    else:
        source = known_device(options.device)
        memory = options.memory or (None if source.memory is None else int(source.memory))
    question = Question(slices, images, source, memory, options.context, options.chunk)
    plan = plan_model(subject, question, options.preset)
    facts = plan.facts()
    # Weights that are in 4 bits already are not calibrated.
    if plan.preset is not None and not subject.quantized and PRESETS[plan.preset].weights == "int4":
        facts["calibration"] = estimate_memory(plan.model, CalibrationOptions(), 0).total
    return facts
