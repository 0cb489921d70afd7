"""The application: routes over a service, as any ASGI server runs it."""

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from importlib.metadata import version
from typing import Any, TypeVar

import anyio.to_thread
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from PIL import Image
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from uhd_export.runtime.errors import UhdError, explain
from uhd_export.runtime.serving.http import chat
from uhd_export.runtime.serving.http.fetch import Fetcher, FetchLimits
from uhd_export.runtime.serving.http.guard import Guard
from uhd_export.runtime.serving.http.metrics import Metrics
from uhd_export.runtime.serving.http.planning import describe_plan
from uhd_export.runtime.serving.http.schema import (
    ChatMessage,
    ChatRequest,
    PlanAnswer,
    PlanRequest,
    ProblemAnswer,
    TokenizeAnswer,
    TokenizeRequest,
)
from uhd_export.runtime.serving.images import read_image
from uhd_export.runtime.serving.queue import Busy
from uhd_export.runtime.serving.request import AnswerStream
from uhd_export.runtime.serving.request import Request as Wish
from uhd_export.runtime.serving.scheduler import Closed
from uhd_export.runtime.serving.service import Service

T = TypeVar("T")
_ENDS = {
    "deadline": (504, "the time for this request is over; ask for fewer tokens"),
    "closed": (503, "the server is shutting down; ask another"),
    "slow": (408, "the answer was not read"),
    "cancelled": (499, "the client went"),
    "error": (500, "the answer could not be made; the server's log says why"),
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ProblemAnswer} for status in (400, 401, 408, 413, 429, 500, 503, 504)
}


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


def create_app(
    service: Service, options: HttpOptions | None = None, *, fetcher: Fetcher | None = None
) -> FastAPI:
    """The application over an open `service`, which outlives it."""
    options = options or HttpOptions()
    metrics = Metrics(service)
    app = FastAPI(
        title="uhd-export serve",
        version=version("uhd-export"),
        docs_url=None,  # its page would fetch scripts from elsewhere
        redoc_url=None,
        responses=_ERRORS,
    )
    app.state.front = Front(service, options, fetcher or Fetcher(options.fetch))
    app.add_middleware(
        Guard, keys=options.keys, max_bytes=options.max_bytes, body_seconds=options.body_seconds
    )
    if options.cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(options.cors), allow_methods=["*"], allow_headers=["*"]
        )
    _add_errors(app, metrics)
    _add_routes(app, options, metrics)
    return app


class Front:
    """What the routes share: from a request's body to what the service understands."""

    def __init__(self, service: Service, options: HttpOptions, fetcher: Fetcher) -> None:
        self.service, self.options, self.fetcher = service, options, fetcher
        # Images are opened and cut beside the engines; more threads would only take their time.
        self._threads = anyio.CapacityLimiter(2)

    async def image(self, url: str) -> Image.Image:
        """The RGB image at `url`. Raises UhdError."""
        data = await self.fetcher.fetch(url)
        return await self.apart(read_image, data, max_pixels=self.options.max_pixels)

    async def apart(self, function: Callable[..., T], *arguments: object, **options: object) -> T:
        """The result of `function`, run in a thread."""
        call = functools.partial(function, *arguments, **options)
        return await anyio.to_thread.run_sync(call, limiter=self._threads)

    async def dialogue(self, messages: Sequence[ChatMessage]) -> tuple[list[Any], list[Image.Image]]:
        """Turns and their images. Raises UhdError."""
        turns, urls = chat.dialogue(messages)
        if len(urls) > self.options.max_images:
            raise UhdError(f"messages: {len(urls)} images; send at most {self.options.max_images}")
        return turns, [await self.image(url) for url in urls]

    async def wish(self, body: ChatRequest, caller: str) -> Wish:
        """The service's request for `body`. Raises UhdError naming what is wrong."""
        turns, images = await self.dialogue(body.messages)
        schema = chat.schema(body)
        grammar = None if schema is None else await self.apart(self.service.json_schema, schema)
        return await self.apart(
            self.service.prepare,
            turns,
            images,
            max_tokens=body.max_completion_tokens or body.max_tokens,
            choosing=chat.choosing(body),
            stop=chat.stop_texts(body),
            grammar=grammar,
            seconds=self.options.seconds,
            caller=f"{caller} {body.user or ''}",
        )


def _add_routes(app: FastAPI, options: HttpOptions, metrics: Metrics) -> None:
    @app.post("/v1/chat/completions", response_model=None)
    async def complete(request: Request, body: ChatRequest) -> Response:
        """Answer a dialogue about images, at once or as a stream."""
        front: Front = request.app.state.front
        if body.model not in (None, options.name):
            raise UhdError(f"model: {body.model[:80]!r} is not served; use {options.name}")
        wish = await front.wish(body, request.state.caller)
        stream = front.service.submit(wish)
        writer = chat.Writer(options.name, front.service.tokenizer)
        if body.stream:
            include_usage = body.stream_options is not None and body.stream_options.include_usage
            return EventSourceResponse(_events(stream, writer, include_usage), ping=15)
        return await _whole(request, stream, writer)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model that is served."""
        model = {"id": options.name, "object": "model", "created": 0, "owned_by": "uhd-export"}
        return {"object": "list", "data": [model]}

    @app.post("/v1/plan")
    async def plan(request: Request, body: PlanRequest) -> PlanAnswer:
        """How an image, or one of a size, is cut."""
        front: Front = request.app.state.front
        if (body.image_url is None) == (body.width is None or body.height is None):
            raise UhdError("plan: give image_url, or width and height")
        if body.image_url is not None:
            image = await front.image(body.image_url.url)
            size = image.size
        else:
            size = (body.width or 1, body.height or 1)
        return describe_plan(size, front.service.settings, front.service.manifest.model.projector.side)

    @app.post("/v1/tokenize")
    async def tokenize(request: Request, body: TokenizeRequest) -> TokenizeAnswer:
        """Token ids of a dialogue, and the positions that it takes with its images."""
        front: Front = request.app.state.front
        turns, images = await front.dialogue(body.messages)
        ids = await front.apart(front.service.token_ids, turns)
        planned = [await front.apart(front.service.plan, image) for image in images]
        positions = len(ids) + sum(len(one) - 1 for one in planned)
        return TokenizeAnswer(ids=ids, positions=positions, context=front.service.context)

    @app.get("/health")
    async def health(request: Request) -> Response:
        """200 while requests are taken."""
        alive = request.app.state.front.service.scheduler.alive
        return JSONResponse({"status": "ok" if alive else "closing"}, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics_text() -> Response:
        """Figures for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        """A page to try it on."""
        text = resources.files("uhd_export.runtime.serving.http").joinpath("page.html").read_text("utf-8")
        policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
        policy += "img-src data: blob:; connect-src 'self'; frame-ancestors 'none'"
        return HTMLResponse(text, headers={"Content-Security-Policy": policy})


async def _events(
    stream: AnswerStream, writer: chat.Writer, include_usage: bool
) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events; where the client goes, this is closed and the answer with it."""
    try:
        yield ServerSentEvent(writer.first())
        async for piece in stream.pieces():
            yield ServerSentEvent(writer.piece(piece))
        if stream.summary.reason in chat.FINISH:
            yield ServerSentEvent(writer.last(stream.summary))
            if include_usage:
                yield ServerSentEvent(writer.usage(stream.summary))
        else:
            status, message = _ENDS[stream.summary.reason]
            yield ServerSentEvent(json.dumps(_problem(message, status)))
        yield ServerSentEvent("[DONE]")
    finally:
        stream.cancel()


async def _whole(request: Request, stream: AnswerStream, writer: chat.Writer) -> Response:
    """The whole answer; where the client goes meanwhile, the answer ends."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        stream.cancel()

    watching = asyncio.create_task(watch())
    try:
        pieces = [piece async for piece in stream.pieces()]
    finally:
        watching.cancel()
        stream.cancel()
    if stream.summary.reason not in chat.FINISH:
        status, message = _ENDS[stream.summary.reason]
        return JSONResponse(_problem(message, status), status)
    text = "".join(piece.text for piece in pieces)
    tokens = [chosen for piece in pieces for chosen in piece.tokens]
    return JSONResponse(writer.answer(text, tokens, stream.summary))


def _problem(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    if status == 429:
        kind = "rate_limit_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


def _add_errors(app: FastAPI, metrics: Metrics) -> None:
    @app.exception_handler(UhdError)
    async def refused(request: Request, error: UhdError) -> Response:
        metrics.refused("refused")
        message = " ".join(str(error).split())
        field_name = message.partition(":")[0]
        return JSONResponse(_problem(message, 400, field_name if field_name.isidentifier() else None), 400)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        metrics.refused("refused")
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
        return JSONResponse(_problem(f"{where}: {first['msg']}", 400, where), 400)

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy) -> Response:
        metrics.refused("busy")
        headers = {"Retry-After": str(max(1, round(error.retry_after)))}
        return JSONResponse(_problem(str(error), 429), 429, headers)

    @app.exception_handler(Closed)
    async def closed(request: Request, error: Closed) -> Response:
        metrics.refused("closed")
        return JSONResponse(_problem(_ENDS["closed"][1], 503), 503)

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        return JSONResponse(_problem(str(error.detail), error.status_code), error.status_code, error.headers)

    @app.exception_handler(MemoryError)
    async def no_memory(request: Request, error: MemoryError) -> Response:
        metrics.refused("error")
        return JSONResponse(_problem(explain(error) or "", 503), 503)
