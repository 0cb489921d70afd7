"""The command `profile`."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from uhd_export.cli.command import Command, concern, option
from uhd_export.cli.given import refuse_given
from uhd_export.cli.opening import PipelineOptions, machine_options
from uhd_export.cli.options import COUNT, json_option
from uhd_export.runtime.choices import GRID_MODES
from uhd_export.runtime.errors import UhdError

STUDIES = ("table1", "table2", "table3", "table4", "table6")
_FILES, _OTHERS = "Files", "Instead of one bundle"
_FILE = click.Path(path_type=Path)
# What is measured, and on what, by the options' names.
_OF_BUNDLES = {"size", "tokens", "grid_modes", "context", "prefill_chunk"}
_MEASURING = _OF_BUNDLES | {"repeats", "device", "threads"}


@dataclass(frozen=True)
class Outputs:
    """Files to write, None for those that are not."""

    html: Path | None = None
    csv: Path | None = None
    trace: Path | None = None

    def check(self, bundle: Path | None) -> None:
        """Raise UhdError, before anything is measured, where one could not be written beside what is read."""
        taken = {} if bundle is None else {bundle.resolve(): "what is read"}
        for name, path in vars(self).items():
            if path is None:
                continue
            folder = path.absolute().parent
            if not folder.is_dir():
                raise UhdError(f"--{name} {path}: there is no folder {path.parent}")
            if path.exists() and not path.is_file():
                raise UhdError(f"--{name} {path}: is no plain file; give another name")
            if not os.access(folder, os.W_OK):
                raise UhdError(f"--{name} {path}: {folder} cannot be written; choose another")
            if path.resolve() in taken:
                raise UhdError(f"--{name} {path}: is {taken[path.resolve()]} too; give another name")
            taken[path.resolve()] = f"--{name}"
        if self.html is not None:
            from uhd_export.runtime.report.charts import draw

            draw({"data": {"values": []}, "mark": "bar"})


@dataclass(frozen=True)
class Measurement:
    """What to measure, as it is typed; see `ProfileOptions`."""

    size: str
    repeats: int
    tokens: int
    grid_modes: tuple[str, ...]


@click.command(cls=Command)
@click.argument("bundle", required=False, type=_FILE)
@concern(
    "measurement",
    Measurement,
    option("--size", default="1008x672", metavar="WIDTHxHEIGHT", help="Image size."),
    option("--repeats", default=5, type=COUNT, metavar="N", help="Measured runs of each grid mode."),
    option("--tokens", default=16, type=COUNT, metavar="N", help="Tokens decoded in each run."),
    option(
        "--grid",
        "grid_modes",
        multiple=True,
        type=click.Choice(GRID_MODES),
        help="Repeatable; default: all three.",
    ),
)
@concern(
    "outputs",
    Outputs,
    option("--html", type=_FILE, metavar="FILE", help="A page with charts; measures more.", section=_FILES),
    option("--csv", type=_FILE, metavar="FILE", help="A row a stage, for spreadsheets.", section=_FILES),
    option(
        "--trace", type=_FILE, metavar="FILE", help="One answer's time line, for Perfetto.", section=_FILES
    ),
)
@option(
    "--compare",
    nargs=2,
    type=_FILE,
    metavar="A B",
    help="Two bundles, run in turns, or two files of --json.",
    section=_OTHERS,
)
@option(
    "--study",
    type=click.Choice(STUDIES),
    help="A table of the paper, counted and measured with random weights.",
    section=_OTHERS,
)
@option("--count", is_flag=True, help="Count the study alone, measure nothing.", section=_OTHERS)
@concern("opening", PipelineOptions, *machine_options)
@json_option
def profile(
    bundle: Path | None,
    measurement: Measurement,
    outputs: Outputs,
    compare: tuple[Path, Path] | None,
    study: str | None,
    count: bool,
    opening: PipelineOptions,
    as_json: bool,
) -> None:
    """Time BUNDLE by stage and grid mode, next to the paper's figures.

    BUNDLE may be a file that --json wrote: then nothing is measured, and --html and --csv are made of it.
    """
    if sum(given is not None for given in (bundle, compare, study)) != 1:
        raise UhdError("profile: give a bundle, or --compare with two, or --study")
    if count and study is None:
        raise UhdError("--count: is of --study; leave it out")
    for name, path in vars(outputs).items():
        if path is not None and bundle is None:
            raise UhdError(f"--{name}: is of one profile; leave it out with --compare and --study")
    if study is not None:
        refuse_given(_OF_BUNDLES, "is of bundles; leave it out with --study")
    if count:
        refuse_given(_MEASURING, "is of what is measured; leave it out with --count")
    outputs.check(bundle)
    if study is not None:
        _study(study, 0 if count else measurement.repeats, opening, as_json)
        return
    if compare is not None:
        _compare(compare, measurement, opening, as_json)
        return
    assert bundle is not None
    if bundle.is_file():
        from uhd_export.runtime.profiling.facts import read_profile, whole

        if outputs.trace is not None:
            raise UhdError(f"--trace: needs a bundle that runs; {bundle} is a profile's file")
        refuse_given(_MEASURING | {"as_json"}, "needs a bundle, and not a profile's file; leave it out")
        if outputs == Outputs():
            raise UhdError(f"profile {bundle}: is a profile's file; give --html or --csv to make of it")
        facts = read_profile(bundle)
        with whole(bundle):
            _write(facts, outputs)
        return
    facts = _profile(bundle, measurement, outputs, opening, as_json)
    _write(facts, outputs)


def _profile(
    bundle: Path, measurement: Measurement, outputs: Outputs, opening: PipelineOptions, as_json: bool
) -> dict[str, Any]:
    """Measure and print; the facts."""
    from uhd_export.runtime.profiling.facts import describe_profile
    from uhd_export.runtime.profiling.profiler import profile_pipeline
    from uhd_export.runtime.profiling.trace import write_trace
    from uhd_export.runtime.progress import progress_bar
    from uhd_export.runtime.terminal.profile_report import print_profile
    from uhd_export.runtime.terminal.report import print_json

    options = _options(measurement, opening, sweep=outputs.html is not None)
    with opening.open(bundle) as pipeline:
        with progress_bar("profile") as bar:
            measured = profile_pipeline(pipeline, options, bar.set)
        facts = describe_profile(measured)
        if as_json:
            print_json(facts)
        else:
            print_profile(measured)
        # Last, since it opens the engines once more: where memory lacks room, what was measured is told.
        if outputs.trace is not None:
            write_trace(pipeline, options, outputs.trace)
    return facts


def _options(measurement: Measurement, opening: PipelineOptions, *, sweep: bool = False) -> Any:
    from uhd_export.runtime.image.source import source_size
    from uhd_export.runtime.profiling.profiler import ProfileOptions

    return ProfileOptions(
        source_size(measurement.size),
        measurement.grid_modes or GRID_MODES,
        measurement.repeats,
        measurement.tokens,
        opening.device,
        opening.threads,
        sweep,
        opening.context,
        opening.prefill_chunk,
    )


def _compare(
    pair: tuple[Path, Path],
    measurement: Measurement,
    opening: PipelineOptions,
    as_json: bool,
) -> None:
    from dataclasses import asdict

    from uhd_export.runtime.profiling.compare import compare
    from uhd_export.runtime.progress import progress_bar
    from uhd_export.runtime.terminal.profile_report import print_comparison
    from uhd_export.runtime.terminal.report import print_json

    if all(path.is_file() for path in pair):
        refuse_given(_MEASURING, "is of bundles; leave it out with two files, which are measured already")
    for path in pair:
        if path.is_dir():
            opening.warn(path)
    with progress_bar("compare") as bar:
        comparison = compare(*pair, _options(measurement, opening), bar.set)
    if as_json:
        print_json(asdict(comparison))
    else:
        print_comparison(comparison)


def _study(study: str, repeats: int, opening: PipelineOptions, as_json: bool) -> None:
    from uhd_export.runtime.progress import progress_bar, status
    from uhd_export.runtime.terminal.report import print_json

    with status("loading PyTorch"):  # which takes seconds
        from uhd_export.study.report import print_study
        from uhd_export.study.run import StudyOptions, run_study

    options = StudyOptions(repeats, device=opening.device, threads=opening.threads)
    with progress_bar(study) as bar:
        facts = run_study(study, options=options, progress=bar.set)
    if as_json:
        print_json(facts)
    else:
        print_study(facts)


def _write(facts: dict[str, Any], outputs: Outputs) -> None:
    from uhd_export.runtime.files import write_file

    if outputs.html is not None:
        from uhd_export.runtime.report.page import profile_page

        write_file(outputs.html, profile_page(facts))
    if outputs.csv is not None:
        from uhd_export.runtime.report.table import profile_csv

        write_file(outputs.csv, profile_csv(facts))
    for path in vars(outputs).values():
        if path is not None:
            click.echo(f"written: {path}", err=True)
