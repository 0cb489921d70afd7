"""The routes. What they share is in the application's state, since FastAPI keeps what they close over."""

import asyncio
import json
from collections.abc import AsyncIterator
from importlib import resources
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from sse_starlette import EventSourceResponse, ServerSentEvent

from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.serving.http import chat
from uhd_export.runtime.serving.http.errors import ENDS, problem
from uhd_export.runtime.serving.http.front import Front
from uhd_export.runtime.serving.http.planning import describe_plan
from uhd_export.runtime.serving.http.schema import (
    ChatRequest,
    PlanAnswer,
    PlanRequest,
    TokenizeAnswer,
    TokenizeRequest,
)
from uhd_export.runtime.serving.scheduling.request import AnswerStream

router = APIRouter()


@router.post("/v1/chat/completions", response_model=None)
async def complete(request: Request, body: ChatRequest) -> Response:
    """Answer a dialogue about images, at once or as a stream."""
    front: Front = request.app.state.front
    name = front.options.name
    if body.model not in (None, name):
        raise UhdError(f"model: {body.model[:80]!r} is not served; use {name}")
    with front.reading():
        wish = await front.wish(body, request.state.caller)
    stream = front.service.submit(wish)
    writer = chat.Writer(name, front.service.tokenizer)
    if body.stream:
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        return EventSourceResponse(_events(stream, writer, include_usage), ping=15)
    return await _whole(request, stream, writer)


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The one model that is served."""
    model = {
        "id": request.app.state.front.options.name,
        "object": "model",
        "created": 0,
        "owned_by": "uhd-export",
    }
    return {"object": "list", "data": [model]}


@router.post("/v1/plan")
async def plan(request: Request, body: PlanRequest) -> PlanAnswer:
    """How an image, or one of a size, is cut."""
    front: Front = request.app.state.front
    if (body.image_url is None) == (body.width is None or body.height is None):
        raise UhdError("plan: give image_url, or width and height")
    if body.image_url is not None:
        size = await front.image(body.image_url.url, lambda image: image.size)
    else:
        size = (body.width or 1, body.height or 1)
    return describe_plan(size, front.service.settings, front.service.manifest.model.projector.side)


@router.post("/v1/tokenize")
async def tokenize(request: Request, body: TokenizeRequest) -> TokenizeAnswer:
    """Token ids of a dialogue, and the positions that it takes with its images."""
    front: Front = request.app.state.front
    with front.reading():
        turns, images = await front.dialogue(body.messages)
        ids = await front.apart(front.service.token_ids, turns)
    positions = len(ids) + sum(len(image.planned) - 1 for image in images)
    return TokenizeAnswer(ids=ids, positions=positions, context=front.service.context)


@router.get("/health")
async def health(request: Request) -> Response:
    """200 while requests are taken."""
    alive = request.app.state.front.service.scheduler.alive
    return JSONResponse({"status": "ok" if alive else "closing"}, 200 if alive else 503)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Figures for Prometheus."""
    return Response(request.app.state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/", include_in_schema=False)
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
            status, message = ENDS[stream.summary.reason]
            yield ServerSentEvent(json.dumps(problem(message, status)))
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
        status, message = ENDS[stream.summary.reason]
        return JSONResponse(problem(message, status), status)
    text = "".join(piece.text for piece in pieces)
    tokens = [chosen for piece in pieces for chosen in piece.tokens]
    return JSONResponse(writer.answer(text, tokens, stream.summary))
