"""What stands before every path: the size of bodies, the time they take, tokens, counting."""

import asyncio
import hmac
import json
import re
from collections.abc import Callable
from typing import Any

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.serving.limits import RefusedError
from prompt_tuning_jax.serving.metrics import Metrics

# Of every answer.  The page loads its script and style from this server, and talks to nobody else.
_SECURITY = [
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        b"img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]


def bearer(token: str) -> Callable[[Request], None]:
    """A check of the Authorization header; nothing is asked where the token is empty.

    A token with letters beyond ASCII may come as UTF-8 or, as some clients send it, as latin-1.
    """
    wanted = [token.encode(encoding, "surrogateescape") for encoding in _encodings(token)]

    def check(request: Request) -> None:
        given = dict(request.scope["headers"]).get(b"authorization", b"")
        scheme, _, value = given.partition(b" ")
        # All are compared, so that the time says nothing.
        same = [hmac.compare_digest(value.strip(), one) for one in wanted]
        if token and not (scheme.lower() == b"bearer" and any(same)):
            raise RefusedError(401, "give the token: Authorization: Bearer TOKEN")

    return check


def checked_token(token: str, *, of: str) -> str:
    """A token as it is compared, without blanks around it.

    UserError that names ``of`` where it is blank or could be in no header.
    """
    bare = token.strip()
    if token and not bare:
        raise UserError(f"{of} is set and blank; give a token, or unset it")
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in bare):
        raise UserError(f"{of} holds a control character, which no header can; choose another")
    return bare


def checked_origin(origin: str, *, of: str) -> str:
    """UserError that names ``of`` for what is no origin as a browser sends it."""
    if origin == "*" or re.fullmatch(r"[a-z][a-z0-9+.-]*://[^\s/@?#*,A-Z]+", origin):
        return origin
    raise UserError(
        f"{of}: {origin!r} is not an origin; give https://example.org, with the port where there "
        "is one and nothing behind it, or * for all"
    )


def _encodings(token: str) -> tuple[str, ...]:
    try:
        token.encode("latin-1")
    except UnicodeEncodeError:
        return ("utf-8",)
    return ("utf-8", "latin-1")


class Guard:
    """Reads a request's body before anybody else does, and refuses it where it is too much.

    A body that is not all there after ``seconds`` is given up.
    """

    def __init__(
        self, app: ASGIApp, *, metrics: Metrics, body_bytes: int, upload_bytes: int, seconds: float
    ) -> None:
        self._app, self._metrics = app, metrics
        self._body_bytes, self._upload_bytes, self._seconds = body_bytes, upload_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0
        # What GET answers, without its body.
        head = scope["method"] == "HEAD"
        if head:
            scope = {**scope, "method": "GET"}

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], *_SECURITY]}
            elif head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        try:
            await self._guarded(scope, receive, noting)
        finally:
            route = scope.get("route")  # its pattern: names of tasks would be labels without end
            path = getattr(route, "path", "other")
            self._metrics.requests.labels(path, status).inc()

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        most = self._upload_bytes if scope["method"] == "PUT" else self._body_bytes
        headers = dict(scope["headers"])
        announced = headers.get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > most:
            await _refuse(send, 413, f"the body has {int(announced)} bytes; at most {most}")
            return
        try:
            async with asyncio.timeout(self._seconds):
                body = await _read(receive, most)
        except TimeoutError:
            await _refuse(send, 408, f"the body was not there after {self._seconds:g} seconds")
            return
        if body is None:  # the client has gone
            return
        if len(body) > most:
            await _refuse(send, 413, f"the body has more than {most} bytes")
            return
        read = False

        async def replayed() -> Message:
            nonlocal read
            if read:
                return await receive()
            read = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replayed, send)


async def _read(receive: Receive, most: int) -> bytes | None:
    parts: list[bytes] = []
    size = 0
    while size <= most:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if not message.get("more_body"):
            break
    return b"".join(parts)


async def _refuse(send: Send, status: int, message: str) -> None:
    error: dict[str, Any] = {"error": {"message": message, "field": "body"}}
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(error).encode()})
