"""A real browser, told what to do through a pipe (Chrome's DevTools protocol)."""

import base64
import fcntl
import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Browser:
    """Headless Chromium with one page; ``run`` evaluates JavaScript in it."""

    def __init__(self, profile: Path) -> None:
        to_browser, self._out = (_high(fd) for fd in os.pipe())
        self._in, from_browser = (_high(fd) for fd in os.pipe())

        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        options += ["--no-first-run", "--disable-dev-shm-usage", f"--user-data-dir={profile}"]
        # Chromium reads and writes 3 and 4; a shell makes them, since JAX dislikes forks.
        command = [str(CHROMIUM), *options, "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{to_browser} 4>&{from_browser}', "bash", *command],
            pass_fds=(to_browser, from_browser),
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._rest = b""
        self._numbers = itertools.count(1)
        self.said: list[str] = []  # what the page's console and its errors say
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self._ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self._ask(f"{domain}.enable", **self._session)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.terminate()
        self._process.wait(10)
        os.close(self._in)
        os.close(self._out)

    def open(self, url: str) -> None:
        self._ask("Page.navigate", url=url, **self._session)
        self.wait_for("location.href !== 'about:blank' && document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self._ask(
            "Runtime.evaluate",
            expression=script,
            returnByValue=True,
            awaitPromise=True,
            **self._session,
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, script: str, *, seconds: float = 20) -> Any:
        """The value of an expression as soon as it is true."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"never: {script}; the page says {self.said}"
            time.sleep(0.05)
        return value

    def resize(self, width: int, height: int) -> None:
        """As on a screen of this size, in pixels."""
        size: Any = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._ask("Emulation.setDeviceMetricsOverride", **size, **self._session)

    def save_picture(self, path: Path) -> None:
        """What is seen, as a PNG."""
        answer = self._ask("Page.captureScreenshot", **self._session)
        path.write_bytes(base64.b64decode(answer["data"]))

    def _ask(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        session = {"sessionId": params.pop("sessionId")} if "sessionId" in params else {}
        message = {"id": number, "method": method, "params": params, **session}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            event = self._read()
            if event.get("id") == number:
                assert "error" not in event, event["error"]
                result: dict[str, Any] = event["result"]
                return result
            if event.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.said.append(json.dumps(event["params"])[:300])

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._in, 65536)
            assert part, "the browser has ended"
            self._rest += part
        line, self._rest = self._rest.split(b"\0", 1)
        event: dict[str, Any] = json.loads(line)
        return event


def _high(fd: int) -> int:
    """The same pipe under a number that is not 3 or 4."""
    high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(fd)
    return high
