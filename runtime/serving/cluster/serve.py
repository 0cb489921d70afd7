"""Ray Serve: a door that takes every request, and a replica for each device that answers it.

The door knows nothing of the model. It sends requests about one image to one replica, by the digest of its
URL, so that what is encoded there is found again; where that replica dies another answers.
"""

import hashlib
import json
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Message

from uhd_export.runtime.serving.cluster.replica import Application, HttpCall
from uhd_export.runtime.serving.http.errors import problem
from uhd_export.runtime.serving.http.front import HttpOptions
from uhd_export.runtime.serving.service import Service

_ATTEMPTS = 3
_IMAGE = re.compile(rb'"url"\s*:\s*"([^"]+)"')


@dataclass(frozen=True)
class ClusterOptions:
    """`replicas` at least and `most` (default: as many) of them; each takes `slots` requests at a time and
    `waiting` more, `gpus` and `cpus`.
    """

    replicas: int = 1
    most: int | None = None
    slots: int = 4
    waiting: int = 64
    gpus: float = 0
    cpus: float = 1
    images: int = 512
    """Whose requests are kept together in one replica; the oldest are forgotten."""


def run(
    open_service: Callable[[], Service],
    http: HttpOptions,
    options: ClusterOptions,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
) -> None:
    """Serve on the cluster that Ray is connected to, or on this machine; returns once it answers."""
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    serve.start(http_options={"host": host, "port": port})
    resources = {"num_gpus": options.gpus, "num_cpus": options.cpus}
    scale = {
        "min_replicas": options.replicas,
        "max_replicas": options.most or options.replicas,
        "target_ongoing_requests": options.slots,
    }
    replica = serve.deployment(
        name="replica",
        max_ongoing_requests=options.slots + options.waiting,
        autoscaling_config=scale,
        ray_actor_options=resources,
        health_check_period_s=2,
        health_check_timeout_s=10,
    )(_replica(options.images))
    door = serve.deployment(name="door", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1024)(Door)
    serve.run(door.bind(replica.bind(open_service, http), http), route_prefix="/")


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
        self._replicas, self._max_bytes = replicas, http.max_bytes

    async def __call__(self, request: Request) -> Response:
        """The replica's answer; 503 where none is left to give one."""
        sent = bytearray()
        async for piece in request.stream():
            sent += piece
            if len(sent) > self._max_bytes:
                text = f"the body has more than {self._max_bytes / 2**20:g} MiB; send smaller or fewer images"
                return JSONResponse(problem(text, 413), 413)
        call = HttpCall(
            request.method,
            request.url.path,
            request.url.query.encode(),
            tuple(request.headers.raw),
            (request.client.host, request.client.port) if request.client else None,
            bytes(sent),
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
