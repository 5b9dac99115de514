"""The heartbeat of a process: how processes learn of each other's failures and signals."""

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from prompt_tuning_jax.errors import UserError

_STORE = "prompt_tuning_jax"  # prefix of the keys


@dataclass(kw_only=True)
class Heartbeat:
    """A thread that shows the other processes that this one is alive, and checks on them.

    Attributes:
      client: the client of the coordination service's key-value store.
      index: the index of this process.
      count: the number of processes.
      silence_seconds: the seconds without a beat after which a process counts as dead.
      interval: the seconds between two beats.
      leave: a function that ends this process with a status.
    """

    client: Any
    index: int
    count: int
    silence_seconds: float
    interval: float = 0.5
    leave: Callable[[int], Any] = os._exit
    _received: list[int] = field(default_factory=list)
    _signal: int = 0
    _step: int = -1
    _stop_at: int | None = None
    _lock: Any = field(default_factory=threading.Lock)
    _finished: threading.Event = field(default_factory=threading.Event)
    _seen: dict[int, tuple[str, float]] = field(default_factory=dict)
    _round: int = 0

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Stops the thread, after this process has ended normally."""
        self._finished.set()
        self._thread.join()
        with suppress(Exception):
            self._set(f"alive/{self.index}", "done")

    def fail(self, error: BaseException) -> None:
        """Prints the error, tells the others, and leaves the process."""
        self._finished.set()
        self._thread.join()
        others: dict[str, str] = {}
        with suppress(Exception):  # the coordinator may be gone
            others = self._read()
        if failed := _failure(others):  # this error only follows from that failure
            self._stop(failed)
        user = isinstance(error, UserError)
        text = str(error) if user else f"{type(error).__name__}: {first_line(error)}"
        if "Gloo" in text:
            text = f"another process ended in the middle of a step ({first_line(error)})"
        elif not user and not isinstance(error, KeyboardInterrupt):
            traceback.print_exception(error)
        print(f"error: process {self.index}: {text}", file=sys.stderr, flush=True)
        with suppress(Exception):
            self._set(f"failed/{self.index}", f"process {self.index} has stopped: {text}")
            self._wait_for_others()
        self._leave(2 if user else 1)

    def agree_on(self, received: list[int], start: int) -> Callable[[int], int]:
        with self._lock:
            self._received, self._step, self._stop_at = received, start, None
            self._round += 1

        def reached(step: int) -> int:
            with self._lock:
                self._step = step
                return self._signal if step == self._stop_at else 0

        return reached

    def _run(self) -> None:
        beat = 0
        while not self._finished.wait(self.interval):
            beat += 1
            try:
                self._set(f"alive/{self.index}", str(beat))
                others = self._read()
            except Exception:
                continue  # process 0 is gone or slow; JAX ends this process if that lasts
            if failed := _failure(others):
                with suppress(Exception):
                    self._set(f"alive/{self.index}", "done")
                self._stop(failed)
            if (silent := self._silent(others)) is not None:
                text = f"process {silent} has not responded for {self.silence_seconds:g} s"
                with suppress(Exception):
                    self._set(f"failed/{silent}", text)
                self._stop(text)
            with suppress(Exception):  # a process is late: try again
                self._agree(others)

    def _silent(self, others: dict[str, str]) -> int | None:
        """Returns a process whose last beat is too long ago, or None."""
        now = time.monotonic()
        for index in set(range(self.count)) - {self.index}:
            beat = others.get(f"alive/{index}", "")
            if beat == "done" or self._seen.get(index, ("", 0.0))[0] != beat:
                self._seen[index] = (beat, now)
            elif index in self._seen and now - self._seen[index][1] > self.silence_seconds:
                return index
            else:
                self._seen.setdefault(index, (beat, now))
        return None

    def _agree(self, others: dict[str, str]) -> None:
        """Agrees with the others on a step to stop at, once one of them has received a signal.

        Every process publishes the step that it has reached, and none continues until all have.
        The lock blocks this process's loop, but not this thread.  Steps that already run on a
        device do not need the lock, and complete.
        """
        with self._lock:
            if self._step < 0 or self._stop_at is not None:
                return
            key = f"signal/{self._round}"
            if key in others:
                self._signal = int(others[key])
            elif self._received:
                self._set(key, str(self._received[0]))
                return  # at the next read, all processes see the same signal
            else:
                return
            self._set(f"reached/{self._round}/{self.index}", str(self._step))
            steps = [
                int(
                    self.client.blocking_key_value_get(
                        f"{_STORE}/reached/{self._round}/{index}", int(1000 * self.silence_seconds)
                    )
                )
                for index in range(self.count)
            ]
            self._stop_at = max(steps) + 1

    def _wait_for_others(self) -> None:
        """Waits until the others have seen this process's failure, at most ten intervals."""
        until = time.monotonic() + 10 * self.interval
        while time.monotonic() < until:
            entries = self._read()
            others = set(range(self.count)) - {self.index}
            if all(entries.get(f"alive/{index}") == "done" for index in others):
                return
            time.sleep(self.interval / 2)

    def _stop(self, text: str) -> None:
        print(
            f"error: process {self.index} stops because {text}; the same command resumes from the "
            "last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        if self.index == 0:
            with suppress(Exception):  # the store ends with this process
                self._wait_for_others()
        self._leave(1)

    def _leave(self, status: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.leave(status)

    def _set(self, key: str, value: str) -> None:
        self.client.key_value_set(f"{_STORE}/{key}", value, allow_overwrite=True)

    def _read(self) -> dict[str, str]:
        entries = self.client.key_value_dir_get(f"{_STORE}/")
        return {name.partition(f"{_STORE}/")[2]: value for name, value in entries}


def _failure(others: dict[str, str]) -> str:
    """Returns the message of a failed process, or an empty string."""
    return next((text for name, text in others.items() if name.startswith("failed/")), "")


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, at most 300 characters."""
    return (str(error) or type(error).__name__).splitlines()[0][:300]
