"""What the package logs as warnings, shown on the command line as notes."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from prompt_tuning_jax.errors import printable


@contextmanager
def notes_on_stderr() -> Iterator[None]:
    """Within, each warning is one line ``note: ...`` on stderr, and the same one comes once."""
    logger = logging.getLogger("prompt_tuning_jax")
    handler, propagates = _Notes(logging.WARNING), logger.propagate
    logger.addHandler(handler)
    logger.propagate = False  # others' handlers would say it again, with a prefix
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


class _Notes(logging.Handler):
    def __init__(self, level: int) -> None:
        super().__init__(level)
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = printable(record.getMessage())
        if text not in self._said:
            self._said.add(text)
            print(f"note: {text}", file=sys.stderr)
