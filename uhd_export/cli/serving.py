"""Options of the commands that answer many questions at a time."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from uhd_export.cli.command import concern, option
from uhd_export.cli.options import COUNT
from uhd_export.runtime.errors import UhdError

if TYPE_CHECKING:
    from uhd_export.cli.opening import PipelineOptions
    from uhd_export.runtime.serving.service import Service

SERVING = "Serving"


@dataclass(frozen=True)
class SlotOptions:
    """How many answers at a time, and what is kept between them."""

    slots: int
    image_cache: int
    waiting: int | None = None

    def slicing(self, opening: "PipelineOptions") -> dict[str, Any]:
        """What takes the place of the bundle's settings."""
        slicing: dict[str, Any] = {"grid_mode": opening.grid_mode, "max_slices": opening.max_slices}
        if opening.resize is not None:
            slicing["resize"] = opening.resize
        return {**slicing, "template": opening.template}

    def open(self, bundle: Path, opening: "PipelineOptions") -> "Service":
        """A service of `bundle`."""
        from uhd_export.runtime.bundle.manifest import read_manifest
        from uhd_export.runtime.engines.backends import default_device
        from uhd_export.runtime.engines.device import parse_device
        from uhd_export.runtime.progress import status
        from uhd_export.runtime.serving.scheduling.scheduler import Limits
        from uhd_export.runtime.serving.service import Service, ServiceOptions

        limits = Limits(waiting=self.waiting or 2 * self.slots, lone_chunk=opening.prefill_chunk)
        options = ServiceOptions(self.slots, opening.context, self.image_cache << 20, limits)
        manifest = read_manifest(bundle)
        options.check(manifest, parse_device(opening.device or default_device(manifest.backend)).kind)
        opening.warn(bundle, beside=options.beside(manifest))
        with status("opening the bundle"):
            return Service.open(
                bundle, options, device=opening.device, threads=opening.threads, slicing=self.slicing(opening)
            )


def share(bundle: Path, opening: "PipelineOptions") -> tuple[int, int]:
    """GPUs and CPUs that a device of a cluster has for `bundle`. Raises UhdError."""
    from uhd_export.runtime.bundle.manifest import read_manifest

    backend = read_manifest(bundle).backend
    device = opening.device or ("cpu" if backend == "onnxruntime" else "cuda")
    if ":" in device:
        raise UhdError(f"--device {device}: a cluster gives each its own GPU; use --device cuda")
    return (1, 1) if device == "cuda" else (0, opening.threads or 1)


_slot_options = (
    option("--slots", default=4, type=COUNT, metavar="N", help="Answers at a time.", section=SERVING),
    option(
        "--image-cache",
        default=256,
        type=click.IntRange(0),
        metavar="MIB",
        help="Encoded images that are kept.",
        section=SERVING,
    ),
)
slot_options = concern("slots", SlotOptions, *_slot_options)
line_options = concern(
    "slots",
    SlotOptions,
    *_slot_options,
    option(
        "--waiting",
        default=64,
        type=COUNT,
        metavar="N",
        help="Most requests beyond free slots; more are answered 429.",
        section=SERVING,
    ),
)
