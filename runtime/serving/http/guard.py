"""What stands before every route: keys, the size of a body, and the time in which it must come."""

import asyncio
import hashlib
import hmac
import json
from collections import deque
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

# What may be asked without a key: that the server lives, and the page, which asks for the key itself.
OPEN = ("/", "/health")
# Bodies of the largest size that may be kept together: more would be memory that nobody planned.
AT_A_TIME = 8


class Guard:
    """Refuses a request without a key (401), with a large body (413) or a slow one (408), or while others'
    bodies take `AT_A_TIME` times the largest (429).

    `scope["state"]["caller"]` is whose turn in the waiting line it is: the key, else the address.
    """

    def __init__(self, app: ASGIApp, *, keys: Sequence[str], max_bytes: int, body_seconds: float) -> None:
        self._app, self._max_bytes, self._body_seconds = app, max_bytes, body_seconds
        self.held = 0
        """Bytes of bodies whose requests are not answered yet."""
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        caller = self._caller(scope, headers)
        if caller is None:
            await refuse(send, 401, "the key is missing or wrong; send Authorization: Bearer KEY")
            return
        scope.setdefault("state", {})["caller"] = caller
        try:
            size = int(headers.get(b"content-length", b"0"))
        except ValueError:
            size = 0
        if size > self._max_bytes:
            await refuse(send, 413, self._too_large())
            return
        body = _Body(self)
        try:
            refusal = await self._read(receive, body)
            if refusal is not None:
                await refuse(send, *refusal)
                return
            await self._app(scope, body.replay(receive), send)
        finally:
            body.drop()

    def _caller(self, scope: Scope, headers: dict[bytes, bytes]) -> str | None:
        """Who asks; None where a key is needed and not given. All keys are compared, in the same time."""
        given = headers.get(b"authorization", b"")
        kind, _, key = given.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        known = [hmac.compare_digest(digest, own) for own in self._keys]
        if self._keys and kind.lower() == b"bearer" and any(known):
            return digest.hex()
        # A browser asks whether it may send the key before it does.
        if self._keys and scope["path"] not in OPEN and scope["method"] != "OPTIONS":
            return None
        return str((scope.get("client") or ("",))[0])

    async def _read(self, receive: Receive, body: "_Body") -> tuple[int, str] | None:
        """All of the body; why it is refused, if it is."""
        try:
            async with asyncio.timeout(self._body_seconds):
                while body.add(await receive()):
                    if body.size > self._max_bytes:
                        return 413, self._too_large()
                    if self.held > AT_A_TIME * self._max_bytes:
                        return 429, "the requests of others fill the memory for bodies; try again in a second"
        except TimeoutError:
            return 408, f"the body did not come within {self._body_seconds:g} s"
        return (413, self._too_large()) if body.size > self._max_bytes else None

    def _too_large(self) -> str:
        return f"the body has more than {self._max_bytes / 2**20:g} MiB; send smaller or fewer images"


class _Body:
    """What came of a request, counted in `guard.held` until it is answered: the application keeps it."""

    def __init__(self, guard: Guard) -> None:
        self._guard, self._messages, self.size = guard, deque[Message](), 0

    def add(self, message: Message) -> bool:
        """Whether more is to come."""
        self._messages.append(message)
        size = len(message.get("body", b""))
        self.size += size
        self._guard.held += size
        return message["type"] == "http.request" and bool(message.get("more_body", False))

    def drop(self) -> None:
        """Count it no more."""
        self._guard.held -= self.size
        self.size = 0

    def replay(self, receive: Receive) -> Receive:
        """First what was read already, then what comes: that the client goes."""

        async def next_message() -> Message:
            if not self._messages:
                return await receive()
            return self._messages.popleft()

        return next_message


async def refuse(send: Send, status: int, message: str) -> None:
    """An answer in OpenAI's form of an error. The connection ends, since a body may be left on it."""
    kind = "authentication_error" if status == 401 else "invalid_request_error"
    body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": None}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"connection", b"close")]
    if status == 429:
        headers.append((b"retry-after", b"1"))
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
