"""The application: routes over a service, as any ASGI server runs it."""

from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from uhd_export.runtime.image.fetch import Fetcher
from uhd_export.runtime.serving.http.errors import add_errors
from uhd_export.runtime.serving.http.front import Front, HttpOptions
from uhd_export.runtime.serving.http.guard import Guard
from uhd_export.runtime.serving.http.metrics import Metrics
from uhd_export.runtime.serving.http.routes import router
from uhd_export.runtime.serving.http.schema import ProblemAnswer
from uhd_export.runtime.serving.service import Service

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ProblemAnswer} for status in (400, 401, 408, 413, 429, 500, 503, 504)
}


def create_app(
    service: Service, options: HttpOptions | None = None, *, fetcher: Fetcher | None = None
) -> FastAPI:
    """The application over an open `service`, which outlives it."""
    options = options or HttpOptions()
    app = FastAPI(
        title="uhd-export serve",
        version=version("uhd-export"),
        docs_url=None,  # its page would fetch scripts from elsewhere
        redoc_url=None,
        responses=_ERRORS,
    )
    app.state.metrics = Metrics(service)
    app.state.front = Front(service, options, fetcher or Fetcher(options.fetch))
    app.add_middleware(
        Guard, keys=options.keys, max_bytes=options.max_bytes, body_seconds=options.body_seconds
    )
    if options.cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(options.cors), allow_methods=["*"], allow_headers=["*"]
        )
    add_errors(app)
    app.include_router(router)
    return app
