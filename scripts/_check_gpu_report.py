"""What the sections of ``check_gpu`` report, and how long they may take; imports no JAX."""

import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

PASS, FAIL, SKIPPED = "pass", "FAIL", "skipped"
_LEAST_SECONDS = 3.0  # a check is not begun if less is left


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line chose; ``small`` is for the shapes of a rehearsal."""

    small: bool
    batch_size: int
    peer_python: str
    peer_model: str


class OutOfTimeError(Exception):
    """The section has used up its time."""


class Report:
    """Writes rows, which are dictionaries that JSON can hold, as soon as they are known.

    ``row`` is "begin" (a check begins), "check" (its status and what came out), "speed" (what a
    program reached) or "machine".
    """

    def __init__(self, write: Callable[[dict[str, Any]], None], options: Options) -> None:
        self._write = write
        self.options = options
        self.section = ""
        self._end = math.inf

    def start(self, section: str, seconds: float) -> None:
        """Begins a section, which has this many seconds."""
        self.section, self._end = section, time.monotonic() + seconds

    def row(self, kind: str, **fields: Any) -> None:
        """Writes a row of this kind."""
        self._write({"row": kind, "section": self.section, **fields})

    def check(self, name: str, passed: bool, result: str) -> None:
        """Reports a check, and what it found."""
        self.row("check", name=name, status=PASS if passed else FAIL, result=result)

    def errors(self, name: str, found: Mapping[str, tuple[float, float]]) -> None:
        """Reports relative errors and their limits, by the precision of the products.

        An error that is NaN is too large.
        """
        said = (f"{mode} {error:.1e} of {most:.0e}" for mode, (error, most) in found.items())
        passed = all(error <= most for error, most in found.values())
        self.check(name, passed, "; ".join(said))

    def skip(self, name: str, why: str) -> None:
        """Reports a check that was not made."""
        self.row("check", name=name, status=SKIPPED, result=why)

    @contextmanager
    def guarded(self, name: str) -> Iterator[None]:
        """Runs a check; whatever it raises becomes a row.

        Where memory or time does not suffice, the check is skipped.
        """
        if time.monotonic() + _LEAST_SECONDS > self._end:
            self.skip(name, "no time left for it")
            raise OutOfTimeError(name)
        self.row("begin", name=name)
        try:
            yield
        except OutOfTimeError:
            raise
        except (Exception, SystemExit) as error:
            traceback.print_exc(file=sys.stderr)
            if _is_out_of_memory(error):
                self.skip(name, "the card's memory does not suffice")
            else:
                self.row("check", name=name, status=FAIL, result=_first_line(error))


def _is_out_of_memory(error: BaseException) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


def _first_line(error: BaseException) -> str:
    text = next((line for line in str(error).splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {text[:200]}"
