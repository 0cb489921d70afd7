"""The options of the commands that open a bundle: on what, and how its images are cut."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from uhd_export.cli.command import concern, option
from uhd_export.cli.options import COUNT, DEVICE, IMAGES, MACHINE, SOURCE, TEMPLATE
from uhd_export.runtime.choices import GRID_MODES
from uhd_export.runtime.engines.device import parse_device

if TYPE_CHECKING:
    from uhd_export.runtime import Pipeline


@dataclass(frozen=True)
class PipelineOptions:
    """How to open a bundle; None is as the bundle, its backend or the machine says."""

    device: str | None = None
    threads: int | None = None
    context: int | None = None
    grid_mode: str | None = None
    max_slices: int | None = None
    resize: int | None = None
    template: str | None = None
    prefill_chunk: int | None = None

    def warn(self, bundle: Path, beside: int = 0) -> None:
        """Say in one line, before anything is loaded, that the memory will not do."""
        from uhd_export.runtime.bundle.manifest import read_manifest
        from uhd_export.runtime.engines.backends import default_device
        from uhd_export.runtime.pipeline import KEEP, configured
        from uhd_export.runtime.planning.bundle import shortage

        manifest = read_manifest(bundle)
        device = str(parse_device(self.device or default_device(manifest.backend)))
        resize = KEEP if self.resize is None else self.resize
        settings = configured(manifest.settings, self.grid_mode, self.max_slices, resize)
        command = click.get_current_context(silent=True)
        slicing = command is None or any(p.name == "max_slices" for p in command.command.params)
        line = shortage(
            manifest, device, settings=settings, context=self.context, beside=beside, slicing=slicing
        )
        if line is not None:
            click.echo(f"warning: {line}", err=True)

    def open(self, bundle: Path) -> "Pipeline":
        """The pipeline of `bundle`."""
        from uhd_export.runtime.pipeline import open_chunked
        from uhd_export.runtime.progress import status

        self.warn(bundle)
        chosen = {name: value for name, value in asdict(self).items() if value is not None}
        with status("opening the bundle"):
            return open_chunked(bundle, **chosen)


machine_options = (
    option(
        "--device",
        type=DEVICE,
        metavar="cpu|cuda|cuda:N",
        help="Default: cpu with onnxruntime, else cuda.",
        section=MACHINE,
    ),
    option("--threads", type=COUNT, metavar="N", help="CPU threads; default: all cores.", section=MACHINE),
    option(
        "--context",
        type=COUNT,
        metavar="N",
        help="Positions of the KV cache; default: the bundle's.",
        section=MACHINE,
    ),
    option(
        "--prefill-chunk",
        type=COUNT,
        metavar="N",
        help="Positions of a prompt a run; default: as many as are faster, or fit.",
        section=MACHINE,
    ),
)
pipeline_options = concern(
    "opening",
    PipelineOptions,
    option(
        "--grid",
        "grid_mode",
        type=click.Choice(GRID_MODES),
        help="Windows of the features; default: the bundle's.",
        section=IMAGES,
    ),
    option(
        "--max-slices",
        type=COUNT,
        metavar="N",
        help="Most slices; 1 means the overview only.",
        section=IMAGES,
    ),
    option("--resize", type=COUNT, metavar="N", help="Longest side before slicing.", section=IMAGES),
    option(
        "--template",
        type=TEMPLATE,
        help="How questions are put; default: the bundle's.",
        section=SOURCE,
    ),
    *machine_options,
)
