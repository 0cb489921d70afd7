"""Image URLs: what leads into a private network, is too large, too slow or goes in circles is refused."""

import asyncio
import io
import ssl
import threading

import pytest
import trustme
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image import fetch
from uhd_export.runtime.image.fetch import Fetcher, FetchLimits, is_public

PUBLIC = "203.0.113.7"  # the address that the tests' names have, which leads to loopback

PRIVATE = """0.0.0.0 10.1.2.3 127.0.0.1 169.254.169.254 172.16.0.1 192.168.1.1 100.64.0.1 224.0.0.1 ::
255.255.255.255 ::1 fe80::1%eth0 fc00::1 ff02::1 ::ffff:127.0.0.1 64:ff9b::a00:1 2002:a00:1:: 203.0.113.7"""


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(file, "PNG")
    return file.getvalue()


async def drip():
    for _ in range(100):
        yield b"x"
        await asyncio.sleep(0.1)


ROUTES = {
    "/image.png": lambda request: Response(png(), media_type="image/png"),
    "/moved": lambda request: RedirectResponse("/image.png"),
    "/circle": lambda request: RedirectResponse("/circle"),
    "/private": lambda request: RedirectResponse("https://internal.example/image.png"),
    "/metadata": lambda request: RedirectResponse("https://169.254.169.254/latest"),
    "/plain": lambda request: RedirectResponse("http://cards.example/image.png"),
    "/file": lambda request: RedirectResponse("file:///etc/passwd"),
    "/large": lambda request: Response(b"x" * 200_000),
    "/slow": lambda request: StreamingResponse(drip()),
    "/missing": lambda request: Response("no", 404),
}


@pytest.fixture(scope="module")
def https():
    """(port, TLS context) of a server for cards.example."""
    authority = trustme.CA()
    app = Starlette(routes=[Route(path, handler) for path, handler in ROUTES.items()])
    config = uvicorn.Config(app, port=0, log_level="critical", lifespan="off")
    config.load()
    config.ssl = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("cards.example", "internal.example").configure_cert(config.ssl)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        pass
    client = ssl.create_default_context()
    authority.configure_trust(client)
    yield server.servers[0].sockets[0].getsockname()[1], client
    server.should_exit = True
    thread.join()


@pytest.fixture
def get(https, monkeypatch):
    """`get(url)` with limits of a test; public addresses lead to the server on loopback."""
    port, client = https
    addresses = {"cards.example": [PUBLIC], "internal.example": ["10.0.0.5"], "both.example": [PUBLIC, "::1"]}
    addresses["2130706433"] = ["127.0.0.1"]  # as the system reads it
    asked = []

    async def resolver(host, _):
        asked.append(host)
        if host not in addresses and not host[0].isdigit() and ":" not in host:
            raise OSError(host)
        return addresses.get(host, [host])

    connect = fetch.httpcore.AnyIOBackend.connect_tcp

    async def loopback(self, host, _, *rest, **options):
        assert host == PUBLIC, f"connected to {host}"
        return await connect(self, "127.0.0.1", port, *rest, **options)

    monkeypatch.setattr(fetch.httpcore.AnyIOBackend, "connect_tcp", loopback)
    limits = FetchLimits(allow_urls=True, max_bytes=100_000, seconds=1)
    fetcher = Fetcher(
        limits, tls=client, resolver=resolver, public=lambda address: address == PUBLIC or is_public(address)
    )
    return lambda url: asyncio.run(fetcher.fetch(url))


def test_an_image_behind_https_and_behind_a_redirect(get):
    assert get("https://cards.example/image.png") == png()
    assert get("https://cards.example/moved") == png()


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://internal.example/image.png", "internal.example is not on the public internet"),
        ("https://both.example/image.png", "both.example is not on the public internet"),
        ("https://cards.example/private", "internal.example is not on the public internet"),
        ("https://cards.example/metadata", "169.254.169.254 is not on the public internet"),
        ("https://127.0.0.1/", "127.0.0.1 is not on the public internet"),
        ("https://[::1]/", "is not on the public internet"),
        ("https://[::ffff:10.0.0.1]/", "is not on the public internet"),
        ("https://2130706433/", "is not on the public internet"),
        ("https://cards.example/plain", "only data URIs and https"),
        ("https://cards.example/file", "only data URIs and https"),
        ("http://cards.example/image.png", "only data URIs and https"),
        ("ftp://cards.example/image.png", "only data URIs and https"),
        ("https://cards.example:8443/image.png", "no other port"),
        ("https://user:word@cards.example/image.png", "no user names"),
        ("https://cards.example/circle", "more than 3 redirects"),
        ("https://cards.example/large", "more than 0.0953674 MiB"),
        ("https://cards.example/slow", "no answer within 1 s"),
        ("https://cards.example/missing", "answered 404"),
        ("https://nowhere.example/", "has no address"),
        ("https://cards.example/\r\nHost: x", "ASCII"),
        ("https://", "only data URIs and https"),
        ("https://[nonsense/", "no valid address"),
        ("https://a..b/x.png", "no valid address"),
        (f"https://{'a' * 64}.example/x.png", "no valid address"),
    ],
)
def test_others_are_refused(get, url, reason):
    with pytest.raises(UhdError) as refused:
        get(url)
    assert reason in str(refused.value)


@pytest.mark.parametrize("address", PRIVATE.split())
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


def test_addresses_that_are_public():
    assert is_public("93.184.216.34") and is_public("2606:2800:220:1::1") and is_public("64:ff9b::5db8:d822")


def test_a_certificate_of_another_is_refused(get, https):
    other = Fetcher(FetchLimits(allow_urls=True), resolver=lambda *_: asyncio.sleep(0, [PUBLIC]), public=bool)
    with pytest.raises(UhdError, match="cannot be fetched"):
        asyncio.run(other.fetch("https://cards.example/image.png"))
