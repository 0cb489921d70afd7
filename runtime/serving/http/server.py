"""The application on a socket, by uvicorn."""

import asyncio
import socket
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from sse_starlette.sse import AppStatus
from uvicorn.protocols.http.h11_impl import H11Protocol

from uhd_export.runtime.errors import UhdError

HEADER_SECONDS = 10.0
# Connections beside those of requests that run or wait: pages, probes, those that rest or are to be refused.
MORE_CONNECTIONS = 512


class TimelyProtocol(H11Protocol):
    """HTTP whose requests' headers must come in time: else a few idle clients could hold all connections."""

    header_seconds = HEADER_SECONDS
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self._forget()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Count the time while a request has begun, or is awaited for the first time, and is not there."""
        if self.conn.their_state is not h11.IDLE:
            self._forget()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.header_seconds, self._late)

    def _late(self) -> None:
        self._timer = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()

    def _forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def make_server(
    app: FastAPI, *, host: str = "127.0.0.1", port: int = 8000, grace: float = 10.0, **options: Any
) -> uvicorn.Server:
    """A server that is not running yet; at its end what is under way has `grace` seconds.

    `options` are uvicorn's.
    """
    # Else sse_starlette cuts every stream as soon as it sees that the server ends.
    AppStatus.disable_automatic_graceful_drain()  # type: ignore[no-untyped-call]
    service = app.state.front.service
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=TimelyProtocol,
        ws="none",
        lifespan="off",
        limit_concurrency=service.options.slots + service.scheduler.limits.waiting + MORE_CONNECTIONS,
        timeout_graceful_shutdown=max(1, round(grace)),
        server_header=False,
        **{"access_log": False, "log_level": "warning", **options},
    )
    return uvicorn.Server(config)


def address_of(host: str, port: int) -> str:
    """Where a browser finds what listens there."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; `port` 0 is a free one. Raises UhdError where it cannot."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise UhdError(f"--host {host}: {error.strerror or error}; give an address of this machine") from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise UhdError(f"--host {host} --port {port}: {error.strerror}; give another") from None
    return listening
