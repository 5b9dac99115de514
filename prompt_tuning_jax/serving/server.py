"""Runs the application until a signal; requests accepted before it are still answered."""

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.serving.connections import ConnectionLimits, limited, within_open_files

_LAST_PORT = 65_535
_TWICE = 1.0  # seconds from which on a second signal is not a duplicate of the first


class _Server(uvicorn.Server):
    """Leaves signals to ``serve``: uvicorn would raise them again at the end, and exit with 143."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bound(host: str, port: int) -> socket.socket:
    """Returns a socket bound to this address, not listening yet; port 0 takes a free port.

    UserError if the address is in use or does not belong to this machine.
    """
    if not 0 <= port <= _LAST_PORT:
        raise UserError(f"--port {port} is not a valid port; it must be from 0 to {_LAST_PORT}")
    named = host.removeprefix("[").removesuffix("]") if ":" in host else host
    listener: socket.socket | None = None
    try:
        if not named.strip():
            raise OSError("give a name or address; 0.0.0.0 is every address of this machine")
        addresses = socket.getaddrinfo(
            named, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, _, _, _, address = addresses[0]
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, ValueError) as error:  # ValueError: not a valid host name
        if listener is not None:
            listener.close()
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--host {host} --port {port} cannot bind to this address: {reason}; "
            "--port 0 takes a free port"
        ) from None
    return listener


def address_of(listener: socket.socket) -> str:
    """Returns the URL of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def serve(
    make: Callable[[Callable[[BaseException | None], None]], FastAPI],
    listener: socket.socket,
    *,
    drain_seconds: float,
    limits: ConnectionLimits | None = None,
    on_drain: Callable[[], None] = lambda: None,
) -> None:
    """Serves until SIGTERM or SIGINT; a second signal skips waiting for open requests.

    ``make`` receives the function that the application calls once its start has finished or failed;
    an error of the start is raised here.  ``listener`` is a bound socket, which is closed at the
    end.  UserError if this process may open too few files, or if another one has begun to listen on
    the address.
    """
    allowed = within_open_files(limits or ConnectionLimits())
    asyncio.run(_serve(make, listener, drain_seconds, allowed, on_drain))


async def _serve(
    make: Callable[[Callable[[BaseException | None], None]], FastAPI],
    listener: socket.socket,
    drain_seconds: float,
    limits: ConnectionLimits,
    on_drain: Callable[[], None],
) -> None:
    failures: list[BaseException] = []

    def started(error: BaseException | None) -> None:
        if error is not None and not server.should_exit:
            failures.append(error)
            server.should_exit = True

    config = uvicorn.Config(
        make(started),
        http=limited(limits),
        ws="none",
        log_level="error",  # no line for each invalid request
        access_log=False,  # texts and tokens stay private
        server_header=False,
        backlog=limits.backlog,
        timeout_keep_alive=limits.keep_alive_seconds,  # type: ignore[arg-type]  # fractions too
        timeout_graceful_shutdown=max(1, round(drain_seconds)),
    )
    server = _Server(config)

    signaled_at: list[float] = []

    def stop() -> None:
        # `timeout` and terminals send a signal twice at once, which counts as one.
        server.force_exit = bool(signaled_at) and loop.time() - signaled_at[0] > _TWICE
        signaled_at.append(loop.time())
        server.should_exit = True
        on_drain()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    try:
        listener.listen(limits.backlog)
    except OSError as error:  # another process bound the same address, and was ready first
        raise UserError(
            f"{address_of(listener)} is in use: {error.strerror}; --port 0 takes a free port"
        ) from None
    await server.serve(sockets=[listener])
    if failures:
        raise failures[0]
