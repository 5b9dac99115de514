"""Runs the application until a signal: what has been taken is answered, then the process ends."""

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from prompt_tuning_jax.errors import UserError

_CONNECTIONS = 1000  # open at once
_TWICE = 1.0  # seconds between two signals that are meant


class _Server(uvicorn.Server):
    """Leaves signals to ``serve``: uvicorn would raise them again at the end, and exit with 143."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bound(host: str, port: int) -> socket.socket:
    """A socket of this address, on which nothing is accepted yet; port 0 takes a free one.

    UserError where the address is taken, or none of this machine.
    """
    own = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        own.bind((host, port))
    except OSError as error:
        own.close()
        raise UserError(
            f"--host {host} --port {port} cannot be listened on: {error.strerror or error}; "
            "--port 0 takes a free one"
        ) from None
    return own


def address_of(own: socket.socket) -> str:
    """Where a browser finds it."""
    host, port = own.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def serve(
    make: Callable[[Callable[[BaseException | None], None]], FastAPI],
    own: socket.socket,
    *,
    drain_seconds: float,
    on_drain: Callable[[], None] = lambda: None,
) -> None:
    """Returns after SIGTERM or SIGINT, or raises what stopped the start; a second signal hurries.

    ``make`` is given what the application is to call once it has started.  ``own`` is a bound
    socket, and closed at the end.
    """
    asyncio.run(_serve(make, own, drain_seconds, on_drain))


async def _serve(
    make: Callable[[Callable[[BaseException | None], None]], FastAPI],
    own: socket.socket,
    drain_seconds: float,
    on_drain: Callable[[], None],
) -> None:
    failures: list[BaseException] = []

    def started(error: BaseException | None) -> None:
        if error is not None and not server.should_exit:
            failures.append(error)
            server.should_exit = True

    config = uvicorn.Config(
        make(started),
        log_level="warning",
        access_log=False,  # texts and tokens are nobody's business
        server_header=False,
        limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=max(1, round(drain_seconds)),
    )
    server = _Server(config)

    told: list[float] = []

    def stop() -> None:
        # `timeout` and terminals send a signal twice at once: that is one.
        server.force_exit = bool(told) and loop.time() - told[0] > _TWICE
        told.append(loop.time())
        server.should_exit = True
        on_drain()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    await server.serve(sockets=[own])
    if failures:
        raise failures[0]
