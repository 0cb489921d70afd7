"""The command `check`."""

from pathlib import Path

import click

from uhd_export.cli.command import Command, option
from uhd_export.cli.options import DEVICE, bundle_argument
from uhd_export.runtime.errors import UhdError, explain


@click.command(cls=Command)
@bundle_argument
@option(
    "--checkpoint", type=click.Path(), metavar="PATH|ID", help="Where the source is; default: as recorded."
)
@option(
    "--device",
    type=DEVICE,
    metavar="cpu|cuda|cuda:N",
    help="Where to measure; default: cpu with onnxruntime, else cuda.",
)
def check(bundle: Path, checkpoint: str | None, device: str | None) -> None:
    """Verify every file of BUNDLE, and measure its parity with the checkpoint again."""
    from uhd_export.runtime.progress import status
    from uhd_export.runtime.terminal.bundle_report import check_files, print_parity, print_quality
    from uhd_export.runtime.units import format_bytes

    try:
        with status("loading PyTorch"):  # which takes seconds
            from uhd_export.bundle.check import check_bundle
    except ModuleNotFoundError as error:
        reason = explain(error)
        if checkpoint is not None or device is not None or reason is None:
            raise
        check_files(bundle, reason)
        return
    report = check_bundle(bundle, checkpoint=checkpoint, device=device, progress=True)
    click.echo(
        f"{bundle}: {len(report.manifest.files)} files, {format_bytes(report.bytes)}, SHA-256 as recorded"
    )
    print_parity(report.manifest.parity, report.measured)
    print_quality(bundle, report.manifest)
    if report.note:
        click.echo(report.note)
    if not report.ok:
        raise UhdError(f"bundle {bundle}: parity is over the limit; build it again with this version")
