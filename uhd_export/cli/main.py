"""The command line: one group, thin commands, and the place where errors become one line."""

import signal
import sys

if (
    sys.argv[0].endswith(("uhd-export", "cli.py", "__main__.py"))
    and signal.getsignal(signal.SIGINT) != signal.SIG_IGN
):
    # The imports below take a moment: until `main` can tell of it, Ctrl-C ends this process without a word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import traceback
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from uhd_export.cli.quantize import image_options, quantize, quantizer, several, weight_options
from uhd_export.runtime.errors import UhdError, explain
from uhd_export.runtime.interrupts import handle_interrupts, was_interrupt

if TYPE_CHECKING:
    from uhd_export.runtime import Pipeline

DEFECT, FAILED, INTERRUPTED = 1, 2, 130
STOPPED = "interrupted; no unfinished output is left (quantizing goes on when the command is given again)"


class OneLineErrors(click.Group):
    """A group whose failures end in one line on stderr; a traceback with --debug."""

    def main(self, args: list[str] | None = None, *rest: Any, **options: Any) -> NoReturn:
        """Run, and exit with 0, 1 (a defect of the program), 2 (failed) or 130 (interrupted)."""
        args = sys.argv[1:] if args is None else list(args)
        try:
            handle_interrupts()
            code = super().main(args, *rest, **{**options, "standalone_mode": False})
            sys.exit(code if isinstance(code, int) else 0)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.ctx.get_help())
            sys.exit(0)
        except (click.Abort, KeyboardInterrupt):
            line, code = STOPPED, INTERRUPTED
        except click.ClickException as error:
            hint = f"; see `{error.ctx.command_path} --help`" if getattr(error, "ctx", None) else ""
            line, code = " ".join(error.format_message().split()).rstrip(".") + hint, FAILED
        except Exception as error:
            line, code = (STOPPED, INTERRUPTED) if was_interrupt(error) else (explain(error), FAILED)
            if line is None or "--debug" in args:
                traceback.print_exc()
            if line is None:
                line = f"this is a defect of the program, please report it ({type(error).__name__}: {error})"
                code = DEFECT
        click.echo(f"error: {line}", err=True)
        sys.exit(code)

    def invoke(self, context: click.Context) -> Any:
        """Run the command that was named; see `main`."""
        try:
            return super().invoke(context)
        except KeyboardInterrupt:
            if sys.stderr.isatty():
                raise  # click ends the line on which the terminal shows ^C
            raise click.Abort from None


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="uhd-export")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Export LLaVA-UHD v2 to engines for one GPU, and run them."""


@main.command()
@click.argument("source", metavar="WIDTHxHEIGHT|IMAGE")
@click.option("--max-slices", default=9, show_default=True, help="Most slices of an image.")
@click.option("--resize", type=int, metavar="N", help="Longest side before slicing; default: as it is.")
@click.option(
    "--grid", "grid_mode", default="selective", show_default=True, help="selective, fix or pyramid."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(source: str, max_slices: int, resize: int | None, grid_mode: str, as_json: bool) -> None:
    """Show how an image is cut, its tokens, and what it costs."""
    from uhd_export.runtime.image.pixels import source_size
    from uhd_export.runtime.image.slicing import plan_slices
    from uhd_export.runtime.progress import status
    from uhd_export.runtime.terminal import report

    with status("opening the image"):
        size = source_size(source)
    facts = report.describe_plan(plan_slices(size, max_slices=max_slices, resize=resize), grid_mode=grid_mode)
    if as_json:
        report.print_json(facts)
    else:
        report.print_plan(facts)


_bundle = click.argument("bundle", type=click.Path(path_type=Path))
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_device = several(
    click.option("--device", help="cpu or cuda; default: cpu with onnxruntime, else cuda."),
    click.option("--threads", type=click.IntRange(1), help="CPU threads; default: all cores."),
    click.option(
        "--context", type=int, metavar="N", help="Positions of the KV cache; default: the bundle's."
    ),
)
_slicing = several(
    click.option("--grid", "grid_mode", help="selective, fix or pyramid; default: the bundle's."),
    click.option("--max-slices", type=int, metavar="N", help="Most slices; 1 means the overview only."),
    click.option("--resize", type=int, metavar="N", help="Longest side before slicing."),
)


_GPUS = "GPU to build engines for, such as 8.6; repeatable; default: 8.0, 8.6, 8.9 and 12.0."


def _open(bundle: Path, *, resize: int | None = None, **options: Any) -> "Pipeline":
    """The pipeline of `bundle`; a `resize` that is not given stays the bundle's."""
    from uhd_export.runtime import Pipeline
    from uhd_export.runtime.progress import status

    if resize is not None:
        options["resize"] = resize
    with status("opening the bundle"):
        return Pipeline.open(bundle, **options)


main.add_command(quantize)


@main.command()
@click.argument("source", metavar="CHECKPOINT")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--backend", default="onnxruntime", show_default=True, help="Or tensorrt-rtx, tensorrt.")
@click.option("--dtype", help="float32 or float16; default: float32 with onnxruntime, else float16.")
@click.option("--compute-capability", "compute_capabilities", multiple=True, metavar="X.Y", help=_GPUS)
@click.option("--plugins/--no-plugins", default=True, show_default=True, help="Engines with our own kernels.")
@click.option("--workspace", type=click.IntRange(1), metavar="MIB", help="Scratch memory of engine layers.")
@click.option("--fold/--no-fold", default=True, show_default=True, help="Fold the projector exactly.")
@image_options
@click.option("--context", type=int, metavar="N", help="Positions of the KV cache; default: the model's.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Measure parity with PyTorch.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@weight_options
def build(source: str, output: Path, **options: Any) -> None:
    """Build a bundle from CHECKPOINT: a folder, a Hugging Face hub id, or nano."""
    from uhd_export.bundle.build import build_bundle
    from uhd_export.runtime.terminal.bundle_report import print_parity, total_bytes
    from uhd_export.runtime.terminal.report import format_bytes

    quantize = quantizer(source, output, options)
    manifest = build_bundle(source, output, quantize=quantize, progress=True, **options)
    print_parity(manifest.parity)
    click.echo(f"{output}: {len(manifest.files)} files, {format_bytes(total_bytes(manifest))}")


@main.command()
@_bundle
@click.argument("image", type=click.Path(path_type=Path))
@click.argument("question", required=False)
@click.option("--image", "more", multiple=True, type=click.Path(path_type=Path), help="A further image.")
@click.option("--max-new-tokens", "tokens", default=256, show_default=True, help="Longest answer.")
@click.option("--temperature", default=0.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-k", default=0, show_default=True, help="Sample among the k likeliest; 0 means all.")
@click.option("--top-p", default=1.0, show_default=True, help="Sample among tokens that make up this share.")
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@_slicing
@_device
def run(
    bundle: Path,
    image: Path,
    question: str | None,
    more: tuple[Path, ...],
    tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int | None,
    **options: Any,
) -> None:
    """Ask BUNDLE about IMAGE; without QUESTION, ask several in a row."""
    from uhd_export.runtime.image.pixels import open_image
    from uhd_export.runtime.language.sampling import Sampling
    from uhd_export.runtime.progress import status
    from uhd_export.runtime.terminal.chat import answer, chat

    sampling = Sampling(temperature, top_k, top_p, seed)
    with status("opening the image"):
        images = [open_image(path) for path in (image, *more)]
    with _open(bundle, **options) as pipeline:
        with status("cutting the image"):
            conversation = pipeline.converse(images)
        if question is None:
            chat(pipeline, conversation, tokens=tokens, sampling=sampling)
        else:
            answer(pipeline, conversation, question, tokens=tokens, sampling=sampling)


@main.command()
@_bundle
@_json
def inspect(bundle: Path, as_json: bool) -> None:
    """Show what BUNDLE holds, and verify its files as opening it does."""
    from uhd_export.runtime.bundle.integrity import verify_files
    from uhd_export.runtime.bundle.manifest import read_manifest
    from uhd_export.runtime.terminal.bundle_report import describe_bundle, print_bundle
    from uhd_export.runtime.terminal.report import print_json

    manifest = read_manifest(bundle)
    verify_files(bundle, manifest)
    if as_json:
        print_json(describe_bundle(bundle, manifest))
    else:
        print_bundle(bundle, manifest)


@main.command()
@_bundle
@click.option("--checkpoint", metavar="PATH|ID", help="Where the source is; default: as recorded.")
def check(bundle: Path, checkpoint: str | None) -> None:
    """Verify every file of BUNDLE, and measure its parity with the checkpoint again."""
    from uhd_export.runtime.terminal.bundle_report import check_files, print_parity, print_quality
    from uhd_export.runtime.terminal.report import format_bytes

    try:
        from uhd_export.bundle.check import check_bundle
    except ModuleNotFoundError as error:
        reason = explain(error)
        if checkpoint is not None or reason is None:
            raise
        check_files(bundle, reason)
        return
    report = check_bundle(bundle, checkpoint=checkpoint, progress=True)
    click.echo(
        f"{bundle}: {len(report.manifest.files)} files, {format_bytes(report.bytes)}, SHA-256 as recorded"
    )
    print_parity(report.manifest.parity, report.measured)
    print_quality(bundle, report.manifest)
    if report.note:
        click.echo(report.note)
    if not report.ok:
        raise UhdError(f"bundle {bundle}: parity is over the limit; build it again with this version")


@main.command("eval")
@_bundle
@click.option("--count", default=200, show_default=True, type=click.IntRange(1), help="Held-out images.")
@_slicing
@_device
@_json
def evaluate(bundle: Path, count: int, as_json: bool, **options: Any) -> None:
    """Measure exact answers on images of cards with codes, which nano was trained to read."""
    from uhd_export.nano.evaluate import evaluate as ask_all
    from uhd_export.runtime.progress import progress_bar
    from uhd_export.runtime.terminal import report

    with _open(bundle, **options) as pipeline, progress_bar("questions", count) as bar:
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


@main.command()
@_bundle
@click.option("--size", default="1008x672", show_default=True, metavar="WIDTHxHEIGHT", help="Image size.")
@click.option("--repeats", default=5, show_default=True, help="Measured runs of each grid mode.")
@click.option("--tokens", default=16, show_default=True, help="Tokens decoded in each run.")
@click.option("--grid", "grid_modes", multiple=True, help="Grid mode, repeatable; default: all three.")
@_device
@_json
def profile(
    bundle: Path,
    size: str,
    repeats: int,
    tokens: int,
    grid_modes: tuple[str, ...],
    device: str | None,
    threads: int | None,
    context: int | None,
    as_json: bool,
) -> None:
    """Time BUNDLE by stage and grid mode, next to the paper's figures."""
    from uhd_export.runtime.image.pixels import source_size
    from uhd_export.runtime.profiling import profiler
    from uhd_export.runtime.progress import progress_bar
    from uhd_export.runtime.terminal import profile_report
    from uhd_export.runtime.terminal.report import print_json

    modes = grid_modes or profiler.GRID_MODES
    steps = profiler.steps(modes, repeats)
    with (
        _open(bundle, device=device, threads=threads, context=context) as pipeline,
        progress_bar("profile", steps) as bar,
    ):
        measured = profiler.profile_pipeline(
            pipeline,
            source_size(size),
            grid_modes=modes,
            repeats=repeats,
            new_tokens=tokens,
            device=device,
            threads=threads,
            on_step=bar.advance,
        )
    if as_json:
        print_json(profile_report.describe_profile(measured))
    else:
        profile_report.print_profile(measured)
