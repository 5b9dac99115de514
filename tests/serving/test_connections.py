"""Clients that say nothing, or half of something, against a real process on the loopback."""

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.serving import connections
from prompt_tuning_jax.serving.connections import ConnectionLimits, within_open_files
from prompt_tuning_jax.serving.server import bound
from tests.tiny_run import ROOT

# An application that answers at once, after a while, or with much; no model is needed for it.
_SERVER = """
import json, resource, sys
from prompt_tuning_jax.serving.connections import ConnectionLimits
from prompt_tuning_jax.serving.server import address_of, bound, serve

limits, files = json.loads(sys.argv[1]), int(sys.argv[2])
if files:
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        print(address_of(own), flush=True)
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    body = b"x" * 20_000_000 if scope["path"] == "/much" else scope["path"].encode()
    if scope["path"] == "/slow":  # until the client has gone
        while (await receive())["type"] != "http.disconnect":
            pass
        return
    await send({"type": "http.response.start", "status": 200,
                "headers": [(b"content-length", str(len(body)).encode())]})
    await send({"type": "http.response.body", "body": body})

with bound("127.0.0.1", 0) as own:
    serve(lambda started: app, own, drain_seconds=1, limits=ConnectionLimits(**limits))
"""


@contextlib.contextmanager
def server(*, files: int = 0, **limits: Any) -> Iterator[tuple[str, int]]:
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER, json.dumps(limits), str(files)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        address = process.stdout.readline().strip()
        assert address, process.stderr.read()
        found = "127.0.0.1", int(address.rpartition(":")[2])
        while status(found, "/") != 200:  # it says its address before it listens
            time.sleep(0.05)
        yield found
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.communicate()


def connected(address: tuple[str, int], sent: bytes = b"") -> socket.socket:
    one = socket.create_connection(address, timeout=10)
    one.sendall(sent)
    return one


def request(path: str, *more: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "host: here", *more, "", ""]).encode()


def answer(one: socket.socket) -> bytes:
    """What comes until the other side says no more, or a whole short answer is there."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while b"\r\n\r\n/" not in found and (part := one.recv(65536)):
            found += part
    return found


def status(address: tuple[str, int], path: str) -> int:
    try:
        with connected(address, request(path, "connection: close")) as one:
            return int(answer(one).split()[1])
    except (ConnectionError, IndexError):
        return 0


def closed_after(one: socket.socket) -> float:
    began = time.monotonic()
    answer(one)
    return time.monotonic() - began


def test_idle_connections_beyond_the_open_files_do_not_stop_it() -> None:
    """300 of them, some with half a request, where 256 files may be open."""
    with server(files=256) as address:
        idle = []
        for number in range(300):
            half = b"GET /healthz HTT" if number % 3 == 0 else b""
            with contextlib.suppress(ConnectionError):
                idle.append(connected(address, half))
            if number % 50 == 49:
                assert status(address, "/healthz") == status(address, "/v1/tasks") == 200
        assert len(idle) > 250
        for one in idle:
            one.close()


def test_where_all_connections_are_busy_its_health_is_still_told() -> None:
    with server(connections=10, per_client=10_000) as address:
        busy = [connected(address, request("/slow")) for _ in range(10)]
        time.sleep(0.3)
        assert status(address, "/healthz") == status(address, "/readyz") == 200
        assert status(address, "/v1/tasks") == 503
        busy.pop().close()
        time.sleep(0.3)
        assert status(address, "/v1/tasks") == 200
        for one in busy:
            one.close()


def test_one_address_has_a_share_of_the_connections() -> None:
    with server(connections=100, per_client=5) as address:
        busy = [connected(address, request("/slow")) for _ in range(5)]
        time.sleep(0.3)
        with connected(address) as refused:
            assert b"503" in answer(refused)
        busy.pop().close()
        time.sleep(0.3)
        first, second = connected(address), connected(address, request("/"))
        assert answer(second).endswith(b"/")
        assert answer(first) == b""  # made room for the second, being idle
        for one in busy:
            one.close()


@pytest.mark.parametrize(
    "sent", [b"", b"GET / HTTP/1.1\r\nhost: a", request("/ok") + b"GET /again HTTP/1.1\r\nhost: a"]
)
def test_a_request_has_to_begin_in_time(sent: bytes) -> None:
    with server(header_seconds=1.0, keep_alive_seconds=60) as address:
        with connected(address, sent) as one:
            if b"/ok" in sent:
                assert answer(one).endswith(b"/ok")
            one.settimeout(0.4)
            for _ in range(2):  # a byte now and then does not help
                with contextlib.suppress(TimeoutError):
                    one.recv(1)
                one.sendall(b"x" if sent else b"")
            one.settimeout(10)
            assert closed_after(one) < 5
        assert status(address, "/") == 200


def test_an_idle_connection_is_kept_for_as_long_as_is_said() -> None:
    with (
        server(keep_alive_seconds=1.5, header_seconds=0.5) as address,
        connected(address, request("/a")) as one,
    ):
        assert answer(one).endswith(b"/a")
        time.sleep(0.8)
        one.sendall(request("/b"))
        assert answer(one).endswith(b"/b")
        assert 0.8 < closed_after(one) < 8


def test_a_blank_line_keeps_no_connection_open() -> None:
    with (
        server(keep_alive_seconds=1.0, header_seconds=0.5) as address,
        connected(address, request("/a")) as one,
    ):
        assert answer(one).endswith(b"/a")
        one.sendall(b"\r\n")
        assert closed_after(one) < 5


@pytest.mark.parametrize("sent", [b"\x00\x01\r\n\r\n", b"GET /a b c HTTP/1.1\r\n\r\n"])
def test_what_is_not_http_gets_an_error_like_any_other(sent: bytes) -> None:
    with server() as address, connected(address, sent) as one:
        head, _, body = answer(one).partition(b"\r\n\r\n")
        assert b" 400 " in head.splitlines()[0] and b"application/json" in head
        assert json.loads(body)["error"]["message"] == "the request is not valid HTTP"


def test_a_beginning_without_end_is_refused() -> None:
    with server(header_bytes=10_000) as address:
        with connected(address, b"GET / HTTP/1.1\r\n") as one:
            with contextlib.suppress(ConnectionError):
                for number in range(30):
                    one.sendall(f"h{number}: {'x' * 1000}\r\n".encode())
            assert b" 431 " in answer(one)
        assert status(address, "/" + "y" * 5000) == 200  # within it


def test_who_does_not_take_the_answer_is_not_waited_for() -> None:
    with server(write_seconds=0.5) as address, connected(address, request("/much")) as one:
        time.sleep(2)
        received = 0
        with contextlib.suppress(ConnectionResetError):
            while part := one.recv(1 << 20):
                received += len(part)
        assert received < 20_000_000
        assert status(address, "/") == 200


def test_the_number_of_open_files_is_raised_or_kept_to(monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[tuple[int, int]] = []
    now = [(1024, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda which: now[0])
    monkeypatch.setattr(resource, "setrlimit", lambda which, to: raised.append(to))
    monkeypatch.setattr(connections, "_open_files", lambda: 20)  # other tests leave some open
    assert within_open_files(ConnectionLimits(connections=1000)).connections == 1000
    assert raised and raised[0][0] > 1100 and raised[0][1] == 4096
    now[0] = (256, 256)
    few = within_open_files(ConnectionLimits(connections=1000, per_client=500))
    assert 20 < few.connections < 180 and few.per_client < few.connections
    assert few.connections + few.backlog < 256
    now[0] = (90, 90)
    with pytest.raises(UserError, match="may open 90 files"):
        within_open_files(ConnectionLimits())
    now[0] = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    assert within_open_files(ConnectionLimits()) == ConnectionLimits()


@pytest.mark.parametrize(
    ("host", "port", "said"),
    [
        ("127.0.0.1", 99_999, "--port 99999"),
        ("127.0.0.1", -1, "--port -1"),
        ("", 0, "0.0.0.0"),
        ("no.such.host.invalid", 0, "no.such.host.invalid"),
        ("a" * 300, 0, "cannot"),
        ("a\0b", 0, "cannot"),
        (".a.", 0, "cannot"),
        ("192.0.2.1", 0, "cannot"),
    ],
)
def test_an_address_that_is_none_is_one_line(host: str, port: int, said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        bound(host, port)
    assert len(str(raised.value).splitlines()) == 1


def test_addresses_that_are_fine() -> None:
    for host in ("127.0.0.1", "localhost", "0.0.0.0"):
        bound(host, 0).close()
    if socket.has_ipv6:
        with contextlib.suppress(UserError):  # a machine may have none
            bound("[::1]", 0).close()


@pytest.mark.parametrize("port", ["99999", "-1", "http", "8000.5", "9" * 5000])
def test_the_command_refuses_what_is_no_port(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    from prompt_tuning_jax.cli.main import main

    assert main(["serve", "--prompts", "nowhere", f"--port={port}"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--port" in said and "Traceback" not in said
