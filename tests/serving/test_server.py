"""The command as a process, on a real socket, with a real browser."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from prompt_tuning_jax.serving.app import make_app
from prompt_tuning_jax.serving.schema import Limits
from prompt_tuning_jax.serving.server import bound, serve
from tests.serving.browser import CHROMIUM, Browser
from tests.serving.live_server import live
from tests.serving.serving_app import make_service, running, task_folder
from tests.serving.serving_micro import write_prompt
from tests.tiny_run import ROOT, model_folder

SMALL = ["--lengths", "8", "--batch_sizes", "1", "--modes", "label", "--max_wait_ms", "3000"]


@contextlib.contextmanager
def command(prompts: Path, *options: str, **env: str) -> Iterator[tuple[Any, str]]:
    """The process and its address, once it is ready."""
    arguments = ["serve", "--model", str(model_folder()), "--prompts", str(prompts), "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "prompt_tuning_jax", *arguments, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, **env},
    )
    try:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("ready: 2 tasks at http://127.0.0.1:"):
                yield process, line.split()[-1]
                return
        raise AssertionError("".join(said))
    finally:
        process.kill()
        process.wait()


def test_the_command_serves_drains_and_ends_well(tmp_path: Path) -> None:
    write_prompt(tmp_path / "one.safetensors", 3)
    write_prompt(tmp_path / "two.safetensors", 4, seed=1)
    answers: list[httpx.Response] = []
    secret = "very-secret-token"
    with command(tmp_path, *SMALL, PROMPT_TUNING_TOKEN=secret) as (process, url):
        headers = {"Authorization": f"Bearer {secret}"}
        body = {"task": ["one", "two"], "inputs": ["ban red", "kolo"]}

        def ask() -> None:
            path = f"{url}/v1/predict"
            answers.append(httpx.post(path, json=body, headers=headers, timeout=30))

        asking = threading.Thread(target=ask)
        with httpx.Client(base_url=url) as client:
            asking.start()
            end = time.monotonic() + 20
            while not client.get("/healthz").json()["waiting"] and not answers:
                assert time.monotonic() < end
                time.sleep(0.01)
        # Twice at once, as `timeout` does it, is no hurry.
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        asking.join(20)
        assert process.wait(20) == 0
        assert answers[0].status_code == 200
        assert len(answers[0].json()["results"]) == 2
        rest = process.stdout.read()
        assert secret not in rest and "kolo" not in rest
        said = [line for line in rest.splitlines() if "programs are compiled" not in line]
        assert len(said) == 1 and said[0].startswith("shutting down")
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/healthz")


def test_a_port_that_is_taken_is_said_before_a_model_is_opened(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from prompt_tuning_jax.config.experiment import Experiment, Model
    from prompt_tuning_jax.errors import UserError
    from prompt_tuning_jax.serving.launch import serve

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port} cannot bind"):
            serve(Experiment(model=Model(name_or_path="nowhere")), "nowhere", port=port)
    assert "opening" not in capsys.readouterr().err


def test_of_two_servers_on_one_port_the_slower_one_says_so() -> None:
    from prompt_tuning_jax.errors import UserError

    slower = bound("127.0.0.1", 0)
    port = slower.getsockname()[1]
    with bound("127.0.0.1", port) as faster, slower:  # none of them listens yet
        faster.listen()
        with pytest.raises(UserError, match=f":{port} is in use.*--port 0"):
            serve(lambda started: FastAPI(), slower, drain_seconds=1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "nowhere"], "no such folder"),
        (["--prompts", "empty"], "there is no prompt"),
        (["--prompts", "bad"], "width"),
        (["--prompts", "good", "--lengths", "8,4"], "lengths is 8,4"),
        (["--prompts", "good", "--batch_sizes", "4", "--cache_rows", "2"], "cache_rows is 2"),
        (["--prompts", "good", "--modes", "rank"], "--modes: 'rank' is invalid"),
        (["--prompts", "good/one.safetensors"], "is a file; give its folder"),
    ],
)
def test_what_cannot_be_served_is_said_at_once(
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import numpy as np

    from prompt_tuning_jax.cli.main import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad").mkdir()
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "bad" / "narrow.npy", np.ones((3, 5), np.float32))
    write_prompt(tmp_path / "good" / "one.safetensors", 3)
    # What it does to its process is for good.
    monkeypatch.setattr("prompt_tuning_jax.serving.malloc_trim.keep_freed_memory", lambda: False)
    assert main(["serve", "--model", str(model_folder()), "--port", "0", *arguments]) == 2
    *before, said = capsys.readouterr().err.splitlines()
    assert message in said and before in ([], [f"opening {model_folder()} and {arguments[1]}"])


def test_who_has_gone_is_not_computed_for(tmp_path: Path) -> None:
    async def test() -> None:
        service = make_service(task_folder(tmp_path), limits=Limits(wait_seconds=0.3))
        async with running(service):
            app = make_app(service)
            app.state.starting = None
            body = json.dumps({"task": "color", "inputs": ["ban"]}).encode()
            messages = [{"type": "http.request", "body": body, "more_body": False}]
            scope = {
                "type": "http",
                "method": "POST",
                "path": "/v1/predict",
                "query_string": b"",
                "headers": [(b"content-type", b"application/json")],
                "app": app,
            }

            async def receive() -> Any:
                if messages:
                    return messages.pop()
                await asyncio.sleep(0.05)
                return {"type": "http.disconnect"}

            async def send(message: Any) -> None:
                return None

            await app(scope, receive, send)
            await asyncio.sleep(0.4)
            assert service.scheduler.waiting == 0
            assert not service.engine.batches  # type: ignore[attr-defined]

    asyncio.run(test())


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium; on Debian: apt-get install chromium")
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    """A person chooses a task, asks, sees votes, words, text as it is written, and an error."""
    service = make_service(task_folder(tmp_path / "tasks"))
    with live(service, token="open sesame") as url, Browser(tmp_path / "profile") as browser:
        browser.open(url)
        browser.wait_for("!document.getElementById('token_field').hidden")
        assert browser.run("$('token_field').offsetWidth") > 0
        browser.run("$('token_field').hidden = true")  # as it is where none is asked for
        assert browser.run("$('token_field').offsetWidth") == 0
        browser.run("$('token_field').hidden = false")
        browser.said.clear()  # the browser itself notes the 401
        browser.run(
            "$('token').value = 'open sesame'; $('token').dispatchEvent(new Event('change'))"
        )
        browser.wait_for("document.querySelectorAll('#tasks option').length === 3")
        assert "micro · 3 tasks" in browser.run("$('model').textContent")
        browser.run("$('task').value = 'voted'; $('task').dispatchEvent(new Event('change'))")
        browser.wait_for("document.querySelectorAll('#words_table tr').length === 1 + 5")
        click = "document.querySelector('button').click()"
        browser.run(f"$('text').value = 'ban <b>red</b>'; {click}")
        browser.wait_for("$('answer').textContent !== ''")
        rows = browser.run(
            "[...document.querySelectorAll('#table tr')].map((r) => "
            "[...r.cells].map((c) => c.textContent))"
        )
        assert rows[0] == ["prompt", "blue", "green", "red"]
        assert [row[0] for row in rows[1:]] == ["ensemble", "seed_0", "seed_1", "seed_2"]
        assert all(cell.endswith(" %") for row in rows[1:] for cell in row[1:])
        assert "ms on the server" in browser.run("$('latency').textContent")
        assert "prompts agree" in browser.run("$('agreement').textContent")
        browser.wait_for("/rows\\/s/.test($('status').textContent)")
        browser.run(f"$('mode').value = 'generate'; {click}")
        browser.wait_for("$('table').textContent.includes('text') && $('agreement').textContent")
        # Two lines are two inputs, and that is said; or one, where that is wanted.
        change = "$('text').dispatchEvent(new Event('input'))"
        browser.run(f"$('text').value = 'ban red\\nkolo <i>\\n'; {change}")
        assert browser.run("$('count').textContent") == "2 inputs"
        browser.run(f"$('mode').value = 'label'; {click}")
        inputs = "[...document.querySelectorAll('#table td.input')].map((c) => c.textContent)"
        assert browser.wait_for(f"!$('result').hidden && {inputs}") == ["ban red", "kolo <i>"]
        browser.run(f"$('mode').value = 'generate'; {click}")
        browser.wait_for("!$('button').disabled && $('latency').textContent")
        assert browser.run(inputs) == ["ban red", "kolo <i>"]
        browser.run("$('lines').click()")
        assert browser.run("$('count').textContent") == "several lines, one input"
        browser.run(f"$('mode').value = 'label'; {click}")
        browser.wait_for("!$('result').hidden && $('agreement').textContent")
        # An error leaves nothing of the answer before it.
        browser.run(f"$('error').textContent = ''; $('task').value = 'nope'; {click}")
        browser.wait_for("$('error').textContent.includes(\"there is no task 'nope'\")")
        assert browser.run("$('result').hidden && $('result').offsetHeight === 0")
        # Nothing is wider than a phone.
        for name in ("color", "nope"):
            browser.run(f"$('lines').click(); $('task').value = '{name}'; {click}")
            browser.wait_for("!$('button').disabled")
            browser.resize(360, 640)
            assert browser.run("document.documentElement.scrollWidth") <= 360
        script = "document.body.appendChild(document.createElement('script')).textContent = 'ran=1'"
        assert browser.run(f"{script}; typeof ran") == "undefined"  # the policy holds
        blocked = "Refused to execute inline script"
        assert any("Content Security Policy" in line for line in browser.said), blocked
        wrong = [line for line in browser.said if not re.search("404|Security Policy", line)]
        assert not wrong, wrong


def test_serve_raises_what_stopped_its_start(tmp_path: Path) -> None:
    service = make_service(task_folder(tmp_path))

    def no_memory(report: Any) -> None:
        raise MemoryError("no room for the programs")

    service.engine.compile_first = no_memory  # type: ignore[method-assign]
    with pytest.raises(MemoryError, match="no room"):
        serve(
            lambda stop: make_app(service, on_started=stop),
            bound("127.0.0.1", 0),
            drain_seconds=1,
        )
