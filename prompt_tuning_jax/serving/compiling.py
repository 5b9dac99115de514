"""Compiles programs in the order in which they are needed, in background threads.

The first programs can answer every request; with them a server is ready.  The others only answer
faster.  They follow one by one: those that were requested most often, then the rest in order.
"""

import logging
import os
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import jax

_log = logging.getLogger(__name__)
_CACHING = "/jax/compilation_cache/cache_misses"  # JAX is about to write a program to its cache
_NICE = 10  # niceness of a thread that compiles while requests are answered


@dataclass(frozen=True, kw_only=True)
class Step:
    """A program to compile; ``first`` if requests cannot be answered without it."""

    key: Hashable
    name: str
    make: Callable[[], Any]
    first: bool


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How many programs are compiled, of all and of the ``first``.

    A program whose compilation failed counts as compiled: it is not tried again.
    """

    made: int
    all: int
    first_made: int
    first: int


class CompilationStoppedError(Exception):
    """The server is shutting down, and the program will not be compiled."""


class Compiler:
    """Holds the compiled programs by key in ``made``, which only grows.

    The threads end with the process, because a compilation cannot be interrupted.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self.made: dict[Hashable, Any] = {}
        self._steps = {step.key: step for step in steps}
        self._first = frozenset(step.key for step in steps if step.first)
        self._todo = dict.fromkeys(self._steps)
        self._requests: Counter[Hashable] = Counter()
        self._failed: dict[Hashable, Exception] = {}
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._caching: set[threading.Thread] = set()
        self._stopped = False

    @property
    def progress(self) -> Progress:
        with self._changed:
            done = {*self.made, *self._failed}
        return Progress(
            made=len(done),
            all=len(self._steps),
            first_made=len(done & self._first),
            first=len(self._first),
        )

    @property
    def is_running(self) -> bool:
        """Whether a program is being compiled."""
        return any(thread.is_alive() for thread in self._threads)

    def start(self, *, later: int = 1) -> None:
        """Compiles one program per processor at once, after the first ones ``later`` at once."""
        if self._threads:
            return
        # JAX holds its listeners forever; this one must not hold the model with them.
        before_caching = weakref.WeakMethod(self._before_caching)

        def listen(event: str, **_: str | int) -> None:
            if (call := before_caching()) is not None:
                call(event)

        jax.monitoring.register_event_listener(listen)
        number = os.cpu_count() or 1
        self._threads = [
            threading.Thread(target=self._work, args=(one < later,), daemon=True)
            for one in range(max(number, later))
        ]
        for thread in self._threads:
            thread.start()

    def want(self, key: Hashable) -> None:
        """Requests a program; those that are requested most often are compiled next."""
        with self._changed:
            if key in self._todo:
                self._requests[key] += 1

    def wait_for_first(self, report: Callable[[str], None]) -> None:
        """Calls ``report`` with the name of each; errors as ``wait_for``."""
        self.wait_for(self._first, report)

    def wait_for_all(self, report: Callable[[str], None]) -> None:
        self.wait_for(frozenset(self._steps), report)

    def wait_for(
        self, keys: Collection[Hashable], report: Callable[[str], None] = lambda name: None
    ) -> None:
        """Waits for these; raises the error of a failed one, or CompilationStoppedError."""
        waiting = {*keys}
        while waiting:
            with self._changed:
                while not (new := {key for key in waiting if self._is_made(key)}):
                    self._changed.wait()
                in_order = [key for key in self.made if key in new]
            waiting -= new
            for key in in_order:
                report(self._steps[key].name)

    def is_made(self, key: Hashable) -> bool:
        """Returns whether this program is compiled; errors as ``wait_for``."""
        with self._changed:
            return self._is_made(key)

    def stop(self) -> None:
        """Starts no further compilation, and no further write to JAX's cache."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def wait_for_writes(self) -> None:
        """Waits until no program is being written to JAX's cache, which does not write atomically.

        After ``stop``, the process can then end at any time.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._caching)

    def _before_caching(self, event: str) -> None:
        """Notes a write to JAX's cache, in the thread that has compiled a program."""
        thread = threading.current_thread()
        if event != _CACHING or thread not in self._threads:
            return
        with self._changed:
            if self._stopped:
                raise SystemExit  # JAX does not catch it
            self._caching.add(thread)

    def _is_made(self, key: Hashable) -> bool:
        if key in self._failed:
            raise self._failed[key]
        if self._stopped and key not in self.made:
            raise CompilationStoppedError
        return key in self.made

    def _work(self, later: bool) -> None:
        while True:
            with self._changed:
                step = self._next(later=later)
            if step is None:
                return
            try:
                made = self._make(step)
            except SystemExit:  # raised before the program would have been written to the cache
                return
            except Exception as error:
                if not step.first:  # larger programs do its work
                    _log.warning("%s could not be compiled: %s", step.name, error)
                with self._changed:
                    self._failed[step.key] = error
                    self._changed.notify_all()
                continue
            with self._changed:
                self.made[step.key] = made
                self._changed.notify_all()

    def _make(self, step: Step) -> Any:
        try:
            return step.make()
        finally:
            with self._changed:
                self._caching.discard(threading.current_thread())
                self._changed.notify_all()

    def _next(self, *, later: bool) -> Step | None:
        if self._stopped:
            return None
        key = next((key for key in self._todo if key in self._first), None)
        if key is None and later:
            _lower_priority()
            requested = [key for key, _ in self._requests.most_common() if key in self._todo]
            key = next(iter([*requested, *self._todo]), None)
        if key is None:
            return None
        del self._todo[key]
        return self._steps[key]


def _lower_priority() -> None:
    """Leaves the processors to threads that answer, on systems with niceness per thread."""
    if sys.platform.startswith("linux"):
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
