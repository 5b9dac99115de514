"""The application on a real socket, in a thread of the test."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from prompt_tuning_jax.serving.app import make_app
from prompt_tuning_jax.serving.service import Service


@contextmanager
def live(service: Service, **options: Any) -> Iterator[str]:
    """The address of the server, once it is ready; at the end it must stop in time."""
    ready = threading.Event()
    app = make_app(service, on_started=lambda error: ready.set(), **options)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=lambda: asyncio.run(server._serve()))
    thread.start()
    try:
        assert ready.wait(60)
        while not server.started:
            ready.wait(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
