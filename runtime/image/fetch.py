"""Images by URL: within limits of size, time and redirects, and of where an address may lead.

A server takes https where that is allowed, and never follows an address into a private network. A person who
names an address on the command line may mean any that this machine reaches.
"""

import asyncio
import ipaddress
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpcore

from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.data_uri import data_uri
from uhd_export.runtime.image.decode import MAX_BYTES

_REDIRECTS = (301, 302, 303, 307, 308)

Resolver = Callable[[str, int], Awaitable[list[str]]]


@dataclass(frozen=True)
class FetchLimits:
    """`allow_urls` admits addresses; an image has at most `max_bytes`, and is there in `seconds` or refused.

    With `public_only` it must be https to the usual port of a machine on the public internet.
    """

    allow_urls: bool = False
    max_bytes: int = 20 << 20
    seconds: float = 10.0
    redirects: int = 3
    public_only: bool = True


async def resolve(host: str, port: int) -> list[str]:
    """The addresses of `host`."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def is_public(address: str) -> bool:
    """Whether `address` is one of the public internet, also where it hides inside an IPv6 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if inner:
            return is_public(str(inner))
        if ip in ipaddress.ip_network("64:ff9b::/96"):  # an IPv4 address behind NAT64
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
    return ip.is_global and not ip.is_multicast


class GuardedNetwork(httpcore.AsyncNetworkBackend):
    """Connects to public addresses only: to the one that was checked, so that DNS can't change between."""

    def __init__(self, resolver: Resolver, public: Callable[[str], bool]) -> None:
        self._resolver, self._public = resolver, public
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """See httpcore. Raises UhdError for an address that is not public."""
        try:
            addresses = await self._resolver(host, port)
        except OSError:
            raise UhdError(f"image_url: {host} has no address") from None
        if not addresses or not all(self._public(address) for address in addresses):
            raise UhdError(f"image_url: {host} is not on the public internet")
        return await self._network.connect_tcp(addresses[0], port, timeout, local_address, socket_options)

    async def sleep(self, seconds: float) -> None:
        """See httpcore."""
        await self._network.sleep(seconds)


class Fetcher:
    """Bytes of images from their URLs. `tls`, `resolver` and `public` are replaced in tests."""

    def __init__(
        self,
        limits: FetchLimits,
        *,
        tls: ssl.SSLContext | None = None,
        resolver: Resolver = resolve,
        public: Callable[[str], bool] = is_public,
    ) -> None:
        self.limits = limits
        self._tls = tls
        self._network = GuardedNetwork(resolver, public)

    async def fetch(self, url: str) -> bytes:
        """What lies at `url`. Raises UhdError naming why it is refused."""
        if url[:5].lower() == "data:":
            return data_uri(url, self.limits.max_bytes, "image_url")
        if not self.limits.allow_urls:
            raise UhdError(
                "image_url: only data URIs are taken here; the server takes https with --allow-urls"
            )
        try:
            async with asyncio.timeout(self.limits.seconds):
                return await self._get(url)
        except TimeoutError:
            raise UhdError(f"image_url: no answer within {self.limits.seconds:g} s") from None
        except httpcore.TimeoutException:
            raise UhdError(f"image_url: no answer within {self.limits.seconds:g} s") from None
        except (httpcore.NetworkError, httpcore.ProtocolError, ssl.SSLError, OSError) as error:
            raise UhdError(f"image_url: cannot be fetched ({error or type(error).__name__})") from None

    async def _get(self, url: str) -> bytes:
        """Follow redirects by hand: each goes through the same checks as the first address."""
        async with httpcore.AsyncConnectionPool(
            ssl_context=self._tls or ssl.create_default_context(),
            network_backend=self._network if self.limits.public_only else None,
        ) as pool:
            for _ in range(self.limits.redirects + 1):
                _check(url, self.limits.public_only)
                async with pool.stream("GET", url, headers={"Accept": "image/*"}) as response:
                    if response.status in _REDIRECTS:
                        target = dict(response.headers).get(b"location", b"").decode("latin-1")
                        url = urljoin(url, target)
                        continue
                    if response.status != 200:
                        raise UhdError(f"image_url: the server answered {response.status}")
                    return await self._body(response)
        raise UhdError(f"image_url: more than {self.limits.redirects} redirects")

    async def _body(self, response: httpcore.Response) -> bytes:
        body = bytearray()
        async for piece in response.aiter_stream():
            body += piece
            if len(body) > self.limits.max_bytes:
                raise self._too_large()
        return bytes(body)

    def _too_large(self) -> UhdError:
        return UhdError(f"image_url: more than {self.limits.max_bytes / 2**20:g} MiB; send it smaller")


def fetch_now(url: str) -> bytes:
    """What lies at `url`, which this machine's user names. Raises UhdError; waits, in any thread."""
    fetcher = Fetcher(FetchLimits(allow_urls=True, max_bytes=MAX_BYTES, seconds=30.0, public_only=False))
    done: Future[bytes] = Future()

    def run() -> None:
        try:
            done.set_result(asyncio.run(fetcher.fetch(url)))
        except BaseException as error:
            done.set_exception(error)

    # A thread of its own: the caller's may run an event loop, and Ctrl-C leaves this one behind.
    threading.Thread(target=run, name="uhd-fetch", daemon=True).start()
    return done.result()


def _check(url: str, public_only: bool) -> None:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        (host or "").encode("idna")  # raises where a label is empty or over 63 characters
    except ValueError:
        raise UhdError("image_url: no valid address") from None
    schemes = ("https",) if public_only else ("https", "http")
    if parts.scheme.lower() not in schemes or not host:
        raise UhdError(f"image_url: only data URIs and {' and '.join(schemes)} addresses are taken")
    if public_only and (parts.username or parts.password or port not in (None, 443)):
        raise UhdError("image_url: no user names and no other port than 443 are taken")
    if not url.isascii() or any(ord(c) < 33 for c in url):
        raise UhdError("image_url: write the address in ASCII, percent-encoded")
