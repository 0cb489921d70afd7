"""The command `serve`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from uhd_export.cli.command import Command, concern, option
from uhd_export.cli.options import COUNT, PipelineOptions, bundle_argument, pipeline_options
from uhd_export.cli.serving import SERVING, SlotOptions, line_options
from uhd_export.runtime.errors import UhdError

if TYPE_CHECKING:
    from uhd_export.runtime.serving.http.front import HttpOptions

HTTP = "HTTP"


def _http(
    api_key: tuple[str, ...], cors: tuple[str, ...], allow_urls: bool, seconds: float, name: str
) -> "HttpOptions":
    from uhd_export.runtime.image.fetch import FetchLimits
    from uhd_export.runtime.serving.http.front import HttpOptions

    if not all(api_key):
        raise UhdError("--api-key: an empty key would let everybody in; give a longer one, or none")
    fetch = FetchLimits(allow_urls=allow_urls)
    return HttpOptions(keys=api_key, cors=cors, seconds=seconds, name=name, fetch=fetch)


@click.command(cls=Command)
@bundle_argument
@option("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 is every one.", section=HTTP)
@option("--port", default=8000, type=click.IntRange(0, 65535), help="0 takes a free one.", section=HTTP)
@concern(
    "http",
    _http,
    option(
        "--api-key",
        multiple=True,
        envvar="UHD_API_KEY",
        metavar="KEY",
        help="Who may ask, repeatable; better in the environment as UHD_API_KEY, separated by spaces.",
        section=HTTP,
    ),
    option("--cors", multiple=True, metavar="ORIGIN", help="Whose pages may ask, repeatable.", section=HTTP),
    option("--allow-urls", is_flag=True, help="Fetch images from public https addresses.", section=HTTP),
    option(
        "--timeout",
        "seconds",
        default=600.0,
        type=click.FloatRange(0, min_open=True),
        metavar="S",
        help="Seconds in which an answer is given, or given up.",
        section=HTTP,
    ),
    option("--name", default="llava-uhd", metavar="NAME", help="Of the model, to clients.", section=HTTP),
)
@option("--grace", default=10, type=COUNT, metavar="S", help="For answers at the end.", section=SERVING)
@line_options
@pipeline_options
def serve(
    bundle: Path,
    host: str,
    port: int,
    http: "HttpOptions",
    grace: int,
    slots: SlotOptions,
    opening: PipelineOptions,
) -> None:
    """Serve BUNDLE to many callers: OpenAI's chat API, metrics, and a page to try it on."""
    from uhd_export.runtime.interrupts import forget_interrupt
    from uhd_export.runtime.serving.http.app import create_app
    from uhd_export.runtime.serving.http.server import listen, make_server

    with listen(host, port) as listening, slots.open(bundle, opening) as service:
        where = "http://{}:{}".format(*listening.getsockname()[:2])
        click.echo(
            f"{where}: {slots.slots} slots of {service.context} positions, "
            f"{service.memory.total / 1e9:.2f} GB reserved; Ctrl-C ends it"
        )
        if host not in ("127.0.0.1", "::1", "localhost") and not http.keys:
            click.echo("everybody who reaches this address may ask; --api-key limits that", err=True)
        try:
            make_server(create_app(service, http), grace=grace).run([listening])
        except KeyboardInterrupt:  # uvicorn ended properly, and then tells what ended it
            forget_interrupt()
