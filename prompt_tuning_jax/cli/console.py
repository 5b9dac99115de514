"""What commands print and write."""

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from prompt_tuning_jax.errors import UserError, printable, printable_json
from prompt_tuning_jax.untrusted_input import json_text

_UNITS = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


@contextmanager
def notes_on_stderr() -> Iterator[None]:
    """Prints each warning that the package logs as a line ``note: ...`` on stderr, once."""
    logger = logging.getLogger("prompt_tuning_jax")
    handler, propagates = _Notes(logging.WARNING), logger.propagate
    logger.addHandler(handler)
    logger.propagate = False  # the root's handlers would print it again, with a prefix
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


class _Notes(logging.Handler):
    def __init__(self, level: int) -> None:
        super().__init__(level)
        self._printed: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = printable(record.getMessage())
        if text not in self._printed:
            self._printed.add(text)
            print_notes([text])


def print_notes(notes: Iterable[str]) -> None:
    """Prints notes on stderr."""
    for note in notes:
        print(printable(f"note: {note}"), file=sys.stderr)


def print_rows(rows: Iterable[tuple[str, str]]) -> None:
    """Prints names, and beside each its text, in two columns."""
    pairs = list(rows)
    width = max((len(name) for name, _ in pairs), default=0)
    for name, text in pairs:
        print(f"{name:{width}}  {text}".rstrip())


def print_json(value: object) -> None:
    """Prints indented JSON."""
    print(printable_json(json_text(value, indent=2)))


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun: ``1 prediction``, ``2,000 predictions``."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def readable_size(size: int) -> str:
    """Returns a number of bytes as ``1.5 GB``."""
    unit, name = next(((u, n) for u, n in _UNITS if size >= u), (1, "bytes"))
    return f"{size} bytes" if unit == 1 else f"{size / unit:.3g} {name}"


def require_folders(**paths: str | None) -> None:
    """Raises UserError for a file that cannot be written there; called before the work is done."""
    for name, path in paths.items():
        if path and Path(path).is_dir():
            raise UserError(f"--{name} {path} is a folder; name a file")
        if path and not Path(path).parent.is_dir():
            raise UserError(f"--{name} {path}: there is no folder {Path(path).parent}")


def require_written_form(option: str, path: str | None) -> None:
    """Raises UserError for the suffix of a format that is read and not written."""
    if path and Path(path).suffix.lower() in (".gz", ".parquet", ".xlsx"):
        raise UserError(
            f"--{option} {path}: this format is not written; name a .jsonl, .json, .csv or .tsv "
            "file, or one of another kind"
        )


def write_text(name: str, text: str, what: str) -> None:
    """Writes a file, and says so on stderr.

    The write is atomic, unless the file is a device such as /dev/stdout.
    """
    from prompt_tuning_jax.storage import text_output

    with text_output(name) as file:
        file.write(text)
    print(f"wrote {what} to {name}", file=sys.stderr)
