"""Reads lines, JSON objects and table rows of a file, with line numbers for error messages.

Files are read as in TensorFlow Datasets (universal newlines, no quoting in tables), except that a
byte order mark is skipped and that errors name the file and the line.
"""

import csv
import gzip
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.untrusted_input import json_text, json_type, read_json, require_whole

# A passage is one field of a table, and may exceed csv's default limit of 128 kB.
_FIELD_LIMIT = 1 << 24
_LONGEST_LINE = 2**27  # bytes: SQuAD's training file is one line of 30 million
_LONGEST_FILE = 2**28  # bytes of a file with a single object
_INTEGER = re.compile(r"-?\d{1,18}")


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (line number, line without its end); UserError if the file is not UTF-8."""
    number = 0
    with _open(path) as file:
        while line := _readline(file, path):
            number += 1
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}:{number}: byte {error.start + 1} of the line is not UTF-8 (or the "
                    "file is cut off there); fetch the file again or convert it with iconv"
                ) from None
            yield number, text.rstrip("\r\n")


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, object); blank lines are skipped."""
    for number, line in text_lines(path):
        if not line.strip():
            continue
        row = parse_json(line, f"{path}:{number}")
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: {json_type(row)} where a JSON object is needed")
        yield number, row


def json_file(path: Path) -> dict[str, Any]:
    """Returns the single JSON object in a file."""
    lines, size = [], 0
    for _, line in text_lines(path):
        lines.append(line)
        size += len(line)
        if size > _LONGEST_FILE:
            raise UserError(f"{path}: more than the {_LONGEST_FILE} characters that are read")
    value = parse_json("\n".join(lines), str(path))
    if not isinstance(value, dict):
        raise UserError(f"{path}: {json_type(value)} where a JSON object is needed")
    return value


def parse_json(text: str, where: str) -> Any:
    """JSON -> Python; the message of UserError begins with ``where``."""
    return read_json(text, of=where, max_bytes=_LONGEST_FILE)


def table_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields (line number, fields) of a tab-separated file, including its header.

    Every tab is a separator, and quotes are text.  Blank lines are skipped.
    """
    numbers: list[int] = [0]

    def lines() -> Iterator[str]:
        for number, line in text_lines(path):
            for part in line.split("\r"):  # a lone carriage return also ends a line
                numbers[0] = number
                yield part

    csv.field_size_limit(max(csv.field_size_limit(), _FIELD_LIMIT))
    reader = csv.reader(lines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{path}:{numbers[0]}: {error}") from None
        if fields is None:
            return
        if fields:
            yield numbers[0], fields


def field(row: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    """Returns a field of a JSON object; UserError if it is missing or of another type."""
    if name not in row:
        known = ", ".join(row) or "none"
        raise UserError(f"{where}: no field {name!r}; there are: {known}")
    value = row[name]
    if kind is int and isinstance(value, str) and _INTEGER.fullmatch(value):
        return int(value)  # AX-b's file has row numbers as text
    # JSON's true is not a number, but Python's bool is an int.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(
            f"{where}: the field {name!r} is {json_text(value)[:40]}, and {_KINDS[kind]} is needed"
        )
    return value


_KINDS = {str: "a text", int: "a whole number", list: "a list", dict: "an object"}


def _open(path: Path) -> IO[bytes]:
    require_whole(path)
    opener: Callable[..., Any] = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        stream: IO[bytes] = opener(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    return stream


def _readline(file: IO[bytes], path: Path) -> bytes:
    try:
        line = file.readline(_LONGEST_LINE + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read, or cut off: {error}") from None
    if len(line) > _LONGEST_LINE:
        raise UserError(f"{path}: a line of more than {_LONGEST_LINE} bytes, which no file has")
    return line
