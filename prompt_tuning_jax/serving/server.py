"""Runs the application until a signal: what has been taken is answered, then the process ends."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

_CONNECTIONS = 1000  # open at once
_TWICE = 1.0  # seconds between two signals that are meant


class _Server(uvicorn.Server):
    """Leaves signals to ``serve``: uvicorn would raise them again at the end, and exit with 143."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(
    make: Callable[[Callable[[BaseException | None], None]], FastAPI],
    *,
    host: str,
    port: int,
    drain_seconds: float,
    on_bound: Callable[[str], None] = lambda address: None,
    on_drain: Callable[[], None] = lambda: None,
) -> None:
    """Returns after SIGTERM or SIGINT, or raises what stopped the start; a second signal hurries.

    ``make`` is given what the application is to call once it has started.  Port 0 takes a free one;
    ``on_bound`` is called with the address.
    """
    asyncio.run(_serve(make, host, port, drain_seconds, on_bound, on_drain))


async def _serve(
    make: Callable[[Callable[[BaseException | None], None]], FastAPI],
    host: str,
    port: int,
    drain_seconds: float,
    on_bound: Callable[[str], None],
    on_drain: Callable[[], None],
) -> None:
    failures: list[BaseException] = []

    def started(error: BaseException | None) -> None:
        if error is not None and not server.should_exit:
            failures.append(error)
            server.should_exit = True

    config = uvicorn.Config(
        make(started),
        host=host,
        port=port,
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
    bound = asyncio.create_task(_tell(server, host, on_bound))
    await server.serve()
    bound.cancel()
    if failures:
        raise failures[0]


async def _tell(server: uvicorn.Server, host: str, on_bound: Callable[[str], None]) -> None:
    while not server.started:
        await asyncio.sleep(0.01)
    number = server.servers[0].sockets[0].getsockname()[1]
    on_bound(f"http://{f'[{host}]' if ':' in host else host}:{number}")
