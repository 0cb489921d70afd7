"""One device of a cluster: the same application as `uhd-export serve`, called by Ray instead of a socket."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from starlette.types import Message

from uhd_export.runtime.serving.http.app import create_app
from uhd_export.runtime.serving.http.front import HttpOptions
from uhd_export.runtime.serving.service import Service

Scope = dict[str, Any]


@dataclass(frozen=True)
class HttpCall:
    """A request as it goes from the door to a replica: what ASGI needs of it, and its body."""

    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    client: tuple[str, int] | None
    body: bytes

    def scope(self) -> Scope:
        """As ASGI has it."""
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": self.query,
            "root_path": "",
            "headers": list(self.headers),
            "client": self.client,
            "server": None,
            "state": {},
        }


class Application:
    """A service with its application; `call` is its only door."""

    def __init__(self, open_service: Callable[[], Service], options: HttpOptions) -> None:
        self.service = open_service()
        self._app = create_app(self.service, options)

    async def call(self, call: HttpCall) -> AsyncIterator[Message]:
        """The ASGI messages that answer `call`. Where the reader goes, so does the answer."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue(maxsize=32)
        gone = asyncio.Event()
        body: list[Message] = [{"type": "http.request", "body": call.body, "more_body": False}]

        async def receive() -> Message:
            if body:
                return body.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self._app(call.scope(), receive, messages.put)
            finally:
                await messages.put(None)

        task = asyncio.create_task(run())
        try:
            while (message := await messages.get()) is not None:
                yield message
            await task
        finally:
            gone.set()
            if not task.done():
                task.cancel()

    def close(self) -> None:
        """Free the engines."""
        self.service.close()
