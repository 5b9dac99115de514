"""Limits connections: how many at once, how many from one address, and how long one may be silent.

uvicorn waits forever for a client that connects and sends no request or half of one, and refuses
every client once its number of connections is reached.  Here the header of a request has a time
limit and a size limit, a full server closes the connection that has been idle longest, and a few
extra connections can still ask for the server's health if all others are busy.
"""

import asyncio
import ipaddress
import json
import os
from collections import Counter
from dataclasses import dataclass
from typing import Any, TypeAlias

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from prompt_tuning_jax.errors import UserError

# Paths that are answered even if all connections are busy.
HEALTH = ("/healthz", "/readyz", "/metrics")
_FOR_HEALTH = 16  # extra connections for these paths only
_FOR_FILES = 64  # open files other than connections: prompts, compiled programs, the log
_BACKLOG = 128  # connections that the system queues before they are accepted
_FEWEST = 8


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """At most ``connections`` are open at once, ``per_client`` of them from one address.

    ``header_seconds`` limits the header of a request, ``keep_alive_seconds`` the time between two
    requests, and ``write_seconds`` how long a client may stop reading its response.
    """

    connections: int = 1000
    per_client: int = 500
    header_seconds: float = 10.0
    header_bytes: int = 65_536
    keep_alive_seconds: float = 5.0
    write_seconds: float = 30.0
    backlog: int = _BACKLOG


class Connections:
    """The open connections of one server."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self._open: dict[Connection, str] = {}
        self._of_client: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._open)

    def enter(self, new: "Connection") -> bool:
        """Returns whether a new connection is accepted; it may be restricted to ``for_health``.

        To make room, closes the connection that has been idle longest (of the same address, if that
        has too many).
        """
        client = _client_of(new)
        if self._of_client[client] >= self.limits.per_client and not self._make_room(client):
            return False
        if len(self._open) >= self.limits.connections and not self._make_room():
            if len(self._open) >= self.limits.connections + _FOR_HEALTH:
                return False
            new.for_health = True
        self._open[new] = client
        self._of_client[client] += 1
        return True

    def leave(self, one: "Connection") -> None:
        """Forgets a connection, if it was accepted."""
        client = self._open.pop(one, None)
        if client is not None:
            self._of_client[client] -= 1
            if not self._of_client[client]:
                del self._of_client[client]

    def _make_room(self, client: str | None = None) -> bool:
        idle = [
            one
            for one, of in self._open.items()
            if one.is_idle and (client is None or of == client)
        ]
        if not idle:
            return False
        # Those that have never sent a request come first.
        longest = min(idle, key=lambda one: (one.asked, one.idle_since))
        self.leave(longest)
        longest.transport.abort()
        return True


class Connection(HttpToolsProtocol):
    """One connection; a subclass per server has its shared ``among``."""

    among: Connections
    for_health = False
    asked = False  # whether it has sent a request's header
    idle_since = 0.0
    _deadline: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None
    _header_bytes: int | None = 0  # received of an incomplete header; None after it

    @property
    def is_idle(self) -> bool:
        """Whether no request of it is being answered or received beyond its header."""
        answered = self.cycle is None or self.cycle.response_complete
        return answered and not self.pipeline

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.idle_since = self.loop.time()
        if not self.among.enter(self):
            self._refuse(503, "too many connections")
            return
        if self.for_health:
            self.app = _health_alone(self.app)
        self._limit_header()

    def connection_lost(self, exc: Exception | None) -> None:
        self.among.leave(self)
        for timer in (self._deadline, self._writing):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._header_bytes is not None:
            self._header_bytes += len(data)
        super().data_received(data)
        if self.parser is None or self.transport.is_closing():
            return
        if self._header_bytes is None and self.is_idle:
            # A blank line begins no request, and yet it stops the timer of an idle connection.
            self._header_bytes = 0
            self._limit_header()
        if (self._header_bytes or 0) > self.among.limits.header_bytes:
            self._refuse(431, "the header of the request is too long")

    def send_400_response(self, msg: str) -> None:
        """Sends the error in the form of all others."""
        self._refuse(400, "the request is not valid HTTP")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._header_bytes is None:  # the next request of this connection
            self._header_bytes = 0
            self._limit_header()

    def on_headers_complete(self) -> None:
        self.asked = True
        self._header_bytes = None
        if self._deadline is not None:
            self._deadline.cancel()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        self.idle_since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing = self.loop.call_later(self.among.limits.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
        super().resume_writing()

    def _limit_header(self) -> None:
        self._deadline = self.loop.call_later(self.among.limits.header_seconds, self._too_slow)

    def _too_slow(self) -> None:
        if not self.is_idle:  # part of the next request arrived while one is being answered
            self._limit_header()
        elif self._header_bytes:
            self._refuse(408, "the header of the request was not received in time")
        elif not self.transport.is_closing():
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        """Sends an error instead of the application's response, and closes the connection."""
        if self.transport.is_closing():
            return
        body = _error(message)
        head = f"HTTP/1.1 {status} \r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()
        self.loop.call_later(1, self.transport.abort)


Asgi: TypeAlias = Any  # uvicorn's type of an application


def limited(limits: ConnectionLimits) -> type[Connection]:
    """Returns the class of one server's connections, for uvicorn."""
    return type("LimitedConnection", (Connection,), {"among": Connections(limits)})


def within_open_files(limits: ConnectionLimits) -> ConnectionLimits:
    """Limits within the number of files that this process may open, which is raised if possible.

    UserError if that is too few to serve any client.
    """
    try:
        import resource
    except ImportError:  # not on this system
        return limits
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_files = _open_files()
    fixed = open_files + _FOR_FILES + _FOR_HEALTH
    wanted = fixed + limits.backlog + limits.connections
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if most > soft:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return limits
    backlog = max(_FEWEST, min(limits.backlog, (soft - fixed) // 4))
    connections = soft - fixed - backlog
    if connections < _FEWEST:
        raise UserError(
            f"this process may open {soft} files, and serving needs "
            f"{fixed + 2 * _FEWEST}; raise the limit: ulimit -n 1024"
        )
    per_client = min(limits.per_client, max(1, connections // 2))
    return ConnectionLimits(
        **{
            **vars(limits),
            "connections": connections,
            "per_client": per_client,
            "backlog": backlog,
        }
    )


def _open_files() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 64


def _client_of(one: Connection) -> str:
    """Returns the client's address; of IPv6 only the network, since clients choose the rest."""
    host = one.client[0] if one.client else ""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))


def _health_alone(app: Asgi) -> Asgi:
    async def health_alone(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] in HEALTH:
            await app(scope, receive, send)
            return
        body = _error("all connections are busy")
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
            (b"retry-after", b"1"),
        ]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return health_alone


def _error(message: str) -> bytes:
    return json.dumps({"error": {"message": message}}).encode()
