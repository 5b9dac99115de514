"""Ctrl-C that is never lost, and never interrupts an import.

Python raises KeyboardInterrupt wherever the main thread is.  The callback of a weak reference, a
destructor or the C code of an import swallows it or turns it into another error, and in the import
of a C extension it can crash the process.
"""

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

_AGAIN_SECONDS = 0.05  # until the signal is sent again, unless the command is exiting
_IMPORT_SECONDS = 3.0  # a longer import is interrupted
# While only these modules are on the stack, a command has not begun its work.
_BEGINNING = re.compile(r"importlib|prompt_tuning_jax(\.cli(\..*)?)?")
_IMPORTING = ("<frozen importlib._bootstrap>", "<frozen importlib._bootstrap_external>")


@dataclass
class Interruption:
    """Whether Ctrl-C was pressed."""

    came: bool = False
    _began: float = 0.0
    _insists: bool = False
    _over: threading.Event = field(default_factory=threading.Event)
    _outside: FrameType | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The handler of SIGINT: raises KeyboardInterrupt, now or as soon as an import is done."""
        if self._over.is_set():
            return
        if self._insists:
            self._insists = False
            if _is_heeded(sys.exc_info()[1]):
                return
        elif self.came:  # pressed a second time
            raise KeyboardInterrupt
        else:
            self.came, self._began = True, time.monotonic()
            threading.Thread(target=self._insist, daemon=True).start()
        importers = self._importers(frame)
        if importers is None or time.monotonic() - self._began > _IMPORT_SECONDS:
            raise KeyboardInterrupt
        if all(_BEGINNING.fullmatch(name) for name in importers):
            sys.stdout.flush()
            os._exit(128 + number)  # there is nothing to clean up yet

    def heeded(self) -> None:
        """The command is exiting: from now on Ctrl-C has no effect."""
        self._over.set()

    def _insist(self) -> None:
        """Sends the signal again until the command has ended."""
        main = threading.main_thread().ident
        while main is not None and not self._over.wait(_AGAIN_SECONDS):
            self._insists = True
            signal.pthread_kill(main, signal.SIGINT)

    def _importers(self, frame: FrameType | None) -> list[str] | None:
        """Returns the modules on the stack above the current import; None without an import."""
        importing, outside = False, list[str]()
        while frame is not None and frame is not self._outside:
            if frame.f_code.co_filename in _IMPORTING:
                importing, outside = True, []
            else:
                outside.append(frame.f_globals.get("__name__", ""))
            frame = frame.f_back
        return outside if importing else None


@contextmanager
def interruptible(outside: FrameType) -> Iterator[Interruption]:
    """Within the context, Ctrl-C interrupts reliably; has no effect outside the main thread.

    ``outside`` is the frame that runs the command; imports below it on the stack do not count.
    Another handler of SIGINT, or a SIGINT that is ignored, stays.
    """
    interruption = Interruption(_outside=outside)
    before = signal.getsignal(signal.SIGINT)
    theirs = before is not signal.default_int_handler and not _is_early(before)
    if theirs or threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    unraisable = sys.unraisablehook

    def report(what: "sys.UnraisableHookArgs") -> None:
        if what.exc_type is not KeyboardInterrupt:  # it is raised again
            unraisable(what)

    signal.signal(signal.SIGINT, interruption)
    sys.unraisablehook = report
    try:
        yield interruption
    finally:
        sys.unraisablehook = unraisable
        interruption.heeded()
        signal.signal(signal.SIGINT, before)


def _is_early(handler: object) -> bool:
    """Returns whether it is the handler of ``__main__``, which ends the process at once."""
    return getattr(handler, "__module__", None) in ("__main__", "prompt_tuning_jax.__main__")


def _is_heeded(error: BaseException | None) -> bool:
    """Returns whether the error that is being handled, or a cause of it, is an interruption."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False
