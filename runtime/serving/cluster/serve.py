"""Ray Serve: a door that takes every request, and a replica for each device that answers it.

The door knows nothing of the model. It sends requests about one image to one replica, by the digest of its
URL, so that what is encoded there is found again; where that replica dies another answers.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import re
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Message

from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.serving.cluster.connection import connect
from uhd_export.runtime.serving.cluster.replica import Application, HttpCall
from uhd_export.runtime.serving.http.errors import problem
from uhd_export.runtime.serving.http.front import HttpOptions
from uhd_export.runtime.serving.service import Service

NAME = "uhd-export"
"""Of the application, to Ray."""
_ATTEMPTS = 3
_IMAGE = re.compile(rb'"url"\s*:\s*"([^"]+)"')


@dataclass(frozen=True)
class ClusterOptions:
    """`replicas` at least and `most` (default: as many) of them; each takes `slots` requests at a time and
    `waiting` more, `gpus` and `cpus`.

    One is added where for `up` seconds more than `slots` requests each were under way, and taken away where
    for `down` seconds fewer; what it answers then has `grace` seconds.
    """

    replicas: int = 1
    most: int | None = None
    slots: int = 4
    waiting: int = 64
    gpus: float = 0
    cpus: float = 1
    images: int = 512
    """Whose requests are kept together in one replica; the oldest are forgotten."""
    up: float = 30.0
    down: float = 600.0
    grace: float = 10.0

    def __post_init__(self) -> None:
        """Raise UhdError naming a field that is out of range."""
        if self.most is not None and self.most < self.replicas:
            raise UhdError(f"--most {self.most}: is less than --cluster {self.replicas}; give more, or none")


@contextlib.contextmanager
def deployed(
    open_service: Callable[[], Service],
    http: HttpOptions,
    options: ClusterOptions,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
) -> Iterator[None]:
    """Serve for the time of the block on the cluster that Ray is connected to, or on this machine.

    Raises UhdError where the replicas do not start, or others are served there.
    """
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    ours = not ray.is_initialized()
    connect(options.replicas, cpus=options.cpus, gpus=options.gpus)
    if serve.status().proxies:
        if ours:
            ray.shutdown()
        raise UhdError(
            "--cluster: this cluster serves already, at an address of its own; end that, or use another"
        )
    try:
        # Ray's 5 seconds of rest for a connection end many just when their next request comes.
        http_options = {"host": host, "port": port, "keep_alive_timeout_s": 60}
        serve.start(http_options=http_options, logging_config={"log_level": "ERROR"})
        serve.run(_application(open_service, http, options), name=NAME, route_prefix="/")
        yield
    except RayServeException as error:
        raise UhdError(f"--cluster: {error}") from None
    except RuntimeError as error:  # what Ray Serve makes of a replica that cannot be made
        if "Deploying application" not in str(error):
            raise
        raise UhdError(f"--cluster: the replicas do not start; {_reason()}") from None
    finally:
        if ray.is_initialized():
            serve.shutdown()  # type: ignore[no-untyped-call]
            if ours:
                ray.shutdown()


def _application(
    open_service: Callable[[], Service], http: HttpOptions, options: ClusterOptions
) -> serve.Application:
    scale = {
        "min_replicas": options.replicas,
        "max_replicas": options.most or options.replicas,
        "target_ongoing_requests": options.slots,
        "upscale_delay_s": options.up,
        "downscale_delay_s": options.down,
        "metrics_interval_s": min(10.0, max(options.up / 3, 0.5)),
        "look_back_period_s": min(30.0, max(options.up, 1.0)),
    }
    replica = serve.deployment(
        name="replica",
        max_ongoing_requests=options.slots + options.waiting,
        autoscaling_config=scale,
        ray_actor_options={"num_gpus": options.gpus, "num_cpus": options.cpus},
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=options.grace,
    )(_replica(options.images))
    door = serve.deployment(name="door", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1024)(Door)
    return door.bind(replica.bind(open_service, http), http)


def _reason() -> str:
    """What Ray tells of the replica that did not start: the exception at the end of its traceback."""
    application = serve.status().applications.get(NAME)
    message = application.deployments["replica"].message if application else ""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), " ".join(lines) or "see Ray's logs")


def _replica(images: int) -> type:
    """The deployment's class: an application that tells Ray which images it has seen."""

    class Replica:
        def __init__(self, open_service: Callable[[], Service], http: HttpOptions) -> None:
            self._application = Application(open_service, http)

        @serve.multiplexed(max_num_models_per_replica=images)  # type: ignore[untyped-decorator]
        async def _seen(self, image: str) -> str:
            return image

        async def call(self, call: HttpCall) -> AsyncIterator[Message]:
            if image := serve.get_multiplexed_model_id():
                await self._seen(image)
            async for message in self._application.call(call):
                yield message

        def check_health(self) -> None:
            if not self._application.service.scheduler.alive:
                raise RuntimeError("the scheduler has ended")

        def __del__(self) -> None:
            if hasattr(self, "_application"):
                self._application.close()

    return Replica


class Door:
    """Takes requests, and passes them to the replica that knows their image."""

    def __init__(self, replicas: Any, http: HttpOptions) -> None:
        self._replicas, self._http = replicas, http

    async def __call__(self, request: Request) -> Response:
        """The replica's answer; 503 where none is left to give one."""
        try:
            async with asyncio.timeout(self._http.body_seconds):
                sent = await self._body(request)
        except TimeoutError:
            text = f"the body did not come within {self._http.body_seconds:g} s"
            return JSONResponse(problem(text, 408), 408)
        if sent is None:
            text = (
                f"the body has more than {self._http.max_bytes / 2**20:g} MiB; send smaller or fewer images"
            )
            return JSONResponse(problem(text, 413), 413)
        call = HttpCall(
            request.method,
            request.url.path,
            request.url.query.encode(),
            tuple(request.headers.raw),
            (request.client.host, request.client.port) if request.client else None,
            sent,
        )
        for _ in range(_ATTEMPTS):
            messages = self._send(call)
            try:
                first = await anext(messages)
                headers = {
                    name.decode("latin-1"): value.decode("latin-1") for name, value in first["headers"]
                }
                if headers.get("content-type", "").startswith("text/event-stream"):
                    return StreamingResponse(_events(messages), first["status"], headers)
                body = b"".join([message.get("body", b"") async for message in messages])
                return Response(body, first["status"], headers)
            except (RayError, RayServeException, StopAsyncIteration):
                continue  # it died before anything was passed on: another may answer
        return JSONResponse(problem("no replica could answer; try again", 503), 503, {"Retry-After": "5"})

    async def _body(self, request: Request) -> bytes | None:
        """All of it; None where it is too large."""
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > self._http.max_bytes:
                return None
        return bytes(body)

    def _send(self, call: HttpCall) -> AsyncIterator[Message]:
        handle = self._replicas.options(stream=True, multiplexed_model_id=image_key(call.body))
        answer: AsyncIterator[Message] = handle.call.remote(call)
        return aiter(answer)


async def _events(messages: AsyncIterator[Message]) -> AsyncIterator[bytes]:
    """The body; where the replica dies in the middle of a stream, an event says so."""
    try:
        async for message in messages:
            yield message.get("body", b"")
    except (RayError, RayServeException):
        text = problem("the replica was lost; ask again", 503)
        yield f"data: {json.dumps(text)}\n\ndata: [DONE]\n\n".encode()


def image_key(body: bytes) -> str:
    """What tells the first image of a request from others; empty where it has none."""
    found = _IMAGE.search(body)
    return hashlib.blake2b(found[1], digest_size=16).hexdigest() if found else ""
