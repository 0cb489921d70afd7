"""The command `inspect`."""

from pathlib import Path

import click

from uhd_export.cli.command import Command
from uhd_export.cli.options import bundle_argument, json_option


@click.command(cls=Command)
@bundle_argument
@json_option
def inspect(bundle: Path, as_json: bool) -> None:
    """Show what BUNDLE holds, and verify its files as opening it does."""
    from uhd_export.runtime.bundle.integrity import verify_files
    from uhd_export.runtime.bundle.manifest import read_manifest
    from uhd_export.runtime.terminal.bundle_report import describe_bundle, print_bundle
    from uhd_export.runtime.terminal.report import print_json

    manifest = read_manifest(bundle)
    verified = verify_files(bundle, manifest)
    if as_json:
        print_json(describe_bundle(bundle, manifest, verified))
    else:
        print_bundle(bundle, manifest, verified)
