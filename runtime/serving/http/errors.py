"""What is answered where there is no answer: one form, OpenAI's, and a status that says whose fault it is."""

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from uhd_export.runtime.errors import UhdError, explain
from uhd_export.runtime.serving.scheduling.queue import Busy
from uhd_export.runtime.serving.scheduling.scheduler import Closed

ENDS = {
    "deadline": (504, "the time for this request is over; ask for fewer tokens"),
    "closed": (503, "the server is shutting down; ask another"),
    "slow": (408, "the answer was not read"),
    "cancelled": (499, "the client went"),
    "error": (500, "the answer could not be made; the server's log says why"),
}
"""Status and reason of answers that did not come to their end."""


def add_errors(app: FastAPI) -> None:
    """Handle every exception that is meant for the caller."""
    app.add_exception_handler(UhdError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Busy, _busy)
    app.add_exception_handler(Closed, _closed)
    app.add_exception_handler(HTTPException, _other)
    app.add_exception_handler(MemoryError, _no_memory)


def problem(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    """The body of such an answer; `param` is the field at fault."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    if status == 429:
        kind = "rate_limit_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


async def _refused(request: Request, error: Any) -> Response:
    request.app.state.metrics.refused("refused")
    message = " ".join(str(error).split())
    field_name = message.partition(":")[0]
    return JSONResponse(problem(message, 400, field_name if field_name.isidentifier() else None), 400)


async def _invalid(request: Request, error: Any) -> Response:
    request.app.state.metrics.refused("refused")
    # Of a field that may be of several kinds each complains: the one that came furthest meant it.
    first = max(error.errors(), key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))
    where, reason = _path(first, error.body), first["msg"]
    if first["type"] == "json_invalid":
        where, reason = "body", f"not JSON at character {first['loc'][-1]} ({first['ctx']['error']})"
    elif where == "body" and isinstance(error.body, bytes):
        reason = "not read as JSON; send Content-Type: application/json"
    return JSONResponse(problem(f"{where}: {reason}", 400, where), 400)


def _path(error: dict[str, Any], body: Any) -> str:
    """The field of `body` that `error` is about, without pydantic's names of a union's kinds."""
    path, value, parts = [], body, error["loc"][1:]
    for number, part in enumerate(parts, 1):
        inside = isinstance(value, dict) and part in value
        inside |= isinstance(value, list) and isinstance(part, int) and part < len(value)
        if inside:
            value = value[part]
        if inside or (number == len(parts) and error["type"] == "missing"):
            path.append(str(part))
    return ".".join(path) or "body"


async def _busy(request: Request, error: Any) -> Response:
    request.app.state.metrics.refused("busy")
    headers = {"Retry-After": str(max(1, round(error.retry_after)))}
    return JSONResponse(problem(str(error), 429), 429, headers)


async def _closed(request: Request, error: Any) -> Response:
    request.app.state.metrics.refused("closed")
    return JSONResponse(problem(ENDS["closed"][1], 503), 503)


async def _other(request: Request, error: Any) -> Response:
    return JSONResponse(problem(str(error.detail), error.status_code), error.status_code, error.headers)


async def _no_memory(request: Request, error: Any) -> Response:
    request.app.state.metrics.refused("error")
    return JSONResponse(problem(explain(error) or "", 503), 503)
