"""The command `serve`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from uhd_export.cli.command import Command, concern, option
from uhd_export.cli.opening import PipelineOptions, pipeline_options
from uhd_export.cli.options import COUNT, bundle_argument
from uhd_export.cli.serving import SERVING, SlotOptions, line_options, share
from uhd_export.runtime.errors import UhdError

if TYPE_CHECKING:
    from uhd_export.runtime.serving.http.front import HttpOptions

HTTP, CLUSTER = "HTTP", "Cluster"


@dataclass(frozen=True)
class Devices:
    """Devices of a cluster, and the most of them where many ask; without, it is this process that serves."""

    cluster: int | None
    most: int | None

    def __post_init__(self) -> None:
        """Raise UhdError where one needs the other."""
        if self.most is not None and self.cluster is None:
            raise UhdError(f"--most {self.most}: needs --cluster N, the devices to begin with")


def _http(
    api_key: tuple[str, ...], cors: tuple[str, ...], allow_urls: bool, seconds: float, name: str
) -> "HttpOptions":
    from uhd_export.runtime.image.fetch import FetchLimits
    from uhd_export.runtime.serving.http.front import HttpOptions

    if not all(api_key):
        raise UhdError("--api-key: an empty key would let everybody in; give a longer one, or none")
    if not seconds > 0:  # which nan passes by where the option is read
        raise UhdError(f"--timeout {seconds}: is no time; give seconds above 0")
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
@concern(
    "devices",
    Devices,
    option(
        "--cluster", type=COUNT, metavar="N", help="Serve on N devices of a Ray cluster.", section=CLUSTER
    ),
    option(
        "--most",
        type=COUNT,
        metavar="N",
        help="Devices while many ask; default: as --cluster says.",
        section=CLUSTER,
    ),
)
@line_options
@pipeline_options
def serve(
    bundle: Path,
    host: str,
    port: int,
    http: "HttpOptions",
    grace: int,
    devices: Devices,
    slots: SlotOptions,
    opening: PipelineOptions,
) -> None:
    """Serve BUNDLE to many callers: OpenAI's chat API, metrics, and a page to try it on."""
    if host not in ("127.0.0.1", "::1", "localhost") and not http.keys:
        click.echo("everybody who reaches this address may ask; --api-key limits that", err=True)
    if devices.cluster is not None:
        _on_cluster(devices, bundle, (host, port), http, grace, slots, opening)
    else:
        _here(bundle, (host, port), http, grace, slots, opening)


def _here(
    bundle: Path,
    address: tuple[str, int],
    http: "HttpOptions",
    grace: int,
    slots: SlotOptions,
    opening: PipelineOptions,
) -> None:
    from uhd_export.runtime.interrupts import forget_interrupt
    from uhd_export.runtime.serving.http.app import create_app
    from uhd_export.runtime.serving.http.server import address_of, listen, make_server

    with listen(*address) as listening, slots.open(bundle, opening) as service:
        where = address_of(*listening.getsockname()[:2])
        click.echo(
            f"{where}: {slots.slots} slots of {service.context} positions, "
            f"{service.memory.total / 1e9:.2f} GB reserved; Ctrl-C ends it"
        )
        try:
            make_server(create_app(service, http), grace=grace).run([listening])
        except KeyboardInterrupt:  # uvicorn ended properly, and then tells what ended it
            forget_interrupt()


def _on_cluster(
    devices: Devices,
    bundle: Path,
    address: tuple[str, int],
    http: "HttpOptions",
    grace: int,
    slots: SlotOptions,
    opening: PipelineOptions,
) -> None:
    from contextlib import ExitStack
    from threading import Event

    from uhd_export.runtime.interrupts import forget_interrupt, handle_interrupts
    from uhd_export.runtime.progress import status
    from uhd_export.runtime.serving.cluster.serve import ClusterOptions, deployed
    from uhd_export.runtime.serving.http.server import address_of, listen

    first, bundle = devices.cluster or 1, bundle.resolve()
    options = ClusterOptions(
        first,
        devices.most,
        slots.slots,
        slots.waiting or 2 * slots.slots,
        *share(bundle, opening),
        grace=grace,
    )
    host = address[0]
    with listen(*address) as free:  # Ray listens itself: a port that is taken is told of here
        port = free.getsockname()[1]
    with ExitStack() as stack:
        with status("starting the replicas"):
            opened = deployed(lambda: slots.open(bundle, opening), http, options, host=host, port=port)
            stack.enter_context(opened)
        handle_interrupts()  # Ray has its own way to end
        most = f" to {devices.most}" if devices.most else ""
        click.echo(f"{address_of(host, port)}: {first}{most} replicas of {slots.slots} slots; Ctrl-C ends it")
        try:
            Event().wait()
        except KeyboardInterrupt:
            forget_interrupt()
