"""Runs before every path: limits a body's size and time, checks tokens, counts requests."""

import asyncio
import hmac
import json
import logging
import re
from collections.abc import Callable
from typing import Any

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.serving.metrics import Metrics
from prompt_tuning_jax.serving.schema import RefusedError

# Headers of every response.  The page loads its script and style from this server only.
_log = logging.getLogger(__name__)
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
    """Returns a check of the Authorization header; an empty token requires nothing.

    Clients may send a token with letters beyond ASCII as UTF-8 or as latin-1.
    """
    wanted = [token.encode(encoding, "surrogateescape") for encoding in _encodings(token)]

    def check(request: Request) -> None:
        given = dict(request.scope["headers"]).get(b"authorization", b"")
        scheme, _, value = given.partition(b" ")
        # All are compared, so that the time reveals nothing.
        same = [hmac.compare_digest(value.strip(), one) for one in wanted]
        if token and not (scheme.lower() == b"bearer" and any(same)):
            raise RefusedError(401, "send the token: Authorization: Bearer TOKEN")

    return check


def checked_token(token: str, *, of: str) -> str:
    """Returns the token without surrounding blanks.

    UserError that names ``of`` if it is blank or cannot be sent in a header.
    """
    bare = token.strip()
    if token and not bare:
        raise UserError(f"{of} is set but blank; set it to a token or unset it")
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in bare):
        raise UserError(
            f"{of} contains a control character, which a header cannot hold; choose another token"
        )
    return bare


def checked_origin(origin: str, *, of: str) -> str:
    """Returns the origin; UserError that names ``of`` unless it has the form that browsers send."""
    if origin == "*" or re.fullmatch(r"[a-z][a-z0-9+.-]*://[^\s/@?#*,A-Z]+", origin):
        return origin
    raise UserError(
        f"{of}: {origin!r} is not a valid origin; write https://example.org, if needed with "
        "a port but without a path, or * for all"
    )


def _encodings(token: str) -> tuple[str, ...]:
    try:
        token.encode("latin-1")
    except UnicodeEncodeError:
        return ("utf-8",)
    return ("utf-8", "latin-1")


class Middleware:
    """Reads the body of each request, and refuses it if it is too large.

    A body that is not complete after ``seconds`` is refused, too.
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
        # Answered as GET, without the body.
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
            await self._limited(scope, receive, noting)
        except Exception:
            if status:  # the response has begun
                raise
            _log.exception("a request has failed")
            await _refuse(noting, 500, "the request failed; the server's log says why", field="")
        finally:
            route = scope.get("route")  # a label per pattern, not per task name
            path = getattr(route, "path", "other")
            self._metrics.requests.labels(path, status).inc()

    async def _limited(self, scope: Scope, receive: Receive, send: Send) -> None:
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
            await _refuse(send, 408, f"the body was not received within {self._seconds:g} seconds")
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


async def _refuse(send: Send, status: int, message: str, *, field: str = "body") -> None:
    error: dict[str, Any] = {"error": {"message": message, **({"field": field} if field else {})}}
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(error).encode()})
