"""Between a request's body and what the service understands: images fetched, read and cut in threads."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import anyio.to_thread
from PIL import Image

from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.fetch import Fetcher, FetchLimits
from uhd_export.runtime.serving.dialogue import Message
from uhd_export.runtime.serving.http import chat
from uhd_export.runtime.serving.http.schema import ChatMessage, ChatRequest
from uhd_export.runtime.serving.images.cutting import CutImage, read_image
from uhd_export.runtime.serving.scheduling.request import Request
from uhd_export.runtime.serving.service import Service

T = TypeVar("T")


@dataclass(frozen=True)
class HttpOptions:
    """`keys` that may ask (none: everybody may), `cors` origins whose pages may, and limits of one request:
    bytes and seconds of its body, images and their pixels, seconds until it is answered.
    """

    keys: Sequence[str] = ()
    cors: Sequence[str] = ()
    max_bytes: int = 32 << 20
    body_seconds: float = 30.0
    max_images: int = 16
    max_pixels: int = 100_000_000
    seconds: float = 600.0
    fetch: FetchLimits = field(default_factory=FetchLimits)
    name: str = "llava-uhd"


class Front:
    """What the routes share: from a request's body to what the service understands."""

    def __init__(self, service: Service, options: HttpOptions, fetcher: Fetcher) -> None:
        self.service, self.options, self.fetcher = service, options, fetcher
        self._reading = 0
        # Images are opened and cut beside the engines; more threads would only take their time.
        self._threads = anyio.CapacityLimiter(2)

    async def image(self, url: str, use: Callable[[Image.Image], T]) -> T:
        """What `use` makes of the RGB image at `url`, whose pixels live no longer. Raises UhdError."""
        data = await self.fetcher.fetch(url)
        return await self.apart(lambda: use(read_image(data, max_pixels=self.options.max_pixels)))

    async def apart(self, function: Callable[..., T], *arguments: object, **options: object) -> T:
        """The result of `function`, run in a thread."""
        call = functools.partial(function, *arguments, **options)
        return await anyio.to_thread.run_sync(call, limiter=self._threads)

    async def dialogue(self, messages: Sequence[ChatMessage]) -> tuple[list[Message], list[CutImage]]:
        """Turns and their images, cut. Raises UhdError."""
        turns, urls = chat.dialogue(messages)
        if len(urls) > self.options.max_images:
            raise UhdError(f"messages: {len(urls)} images; send at most {self.options.max_images}")
        return turns, [await self.image(url, self.service.cut) for url in urls]

    @contextmanager
    def reading(self) -> Iterator[None]:
        """The block in which images of a request are read. Raises Busy before it where none can wait."""
        self.service.scheduler.check_room(self._reading)
        self._reading += 1
        try:
            yield
        finally:
            self._reading -= 1

    async def wish(self, body: ChatRequest, caller: str) -> Request:
        """The service's request for `body`. Raises UhdError naming what is wrong."""
        turns, images = await self.dialogue(body.messages)
        schema = chat.schema(body)
        grammar = None if schema is None else await self.apart(self.service.json_schema, schema)
        return await self.apart(
            self.service.prepare,
            turns,
            images,
            max_tokens=body.max_completion_tokens or body.max_tokens,
            choosing=chat.choosing(body, self.service.settings.sampling),
            stop=chat.stop_texts(body),
            grammar=grammar,
            seconds=self.options.seconds,
            caller=f"{caller} {body.user or ''}",
        )
