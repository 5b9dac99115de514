"""Rows of JSON: an object a line, one array of objects, or objects one after another."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prompt_tuning_jax.data.tasks.text_lines import MAX_LINE, text_lines
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.untrusted_input import json_type, read_json

# Characters of a file that is one value, or whose values go over several lines: it is held whole.
_MAX_WHOLE = 512 * 2**20

_Rows = Iterator[tuple[str, dict[str, Any]]]


def read_json_lines(path: Path) -> _Rows:
    """Yield an object a line; objects that go over several lines are read, too."""
    return _rows(path, array=False)


def read_json_records(path: Path) -> _Rows:
    """Yield the objects of an array, or of a file that holds one after another."""
    return _rows(path, array=True)


def _rows(path: Path, *, array: bool) -> _Rows:
    lines = ((number, line) for number, line in text_lines(path) if line.strip())
    first = next(lines, None)
    if first is None:
        return
    if (array and first[1].lstrip().startswith("[")) or _is_part_of_a_value(first[1]):
        yield from _whole(path, array=array)
        return
    yield _object(first[1], f"{path}:{first[0]}")
    for number, line in lines:
        yield _object(line, f"{path}:{number}")


def _object(text: str, where: str) -> tuple[str, dict[str, Any]]:
    return where, _as_object(
        read_json(text, of=where, parse_numbers_as_text=True, max_bytes=MAX_LINE), where
    )


def _as_object(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise UserError(
        f"{where}: {json_type(value)} where an object is needed; "
        'write one {"column": value} a line (one array of all of them is for a .json file)'
    )


def _is_part_of_a_value(line: str) -> bool:
    """Whether a value begins on this line and does not end on it."""
    if not line.lstrip().startswith(("{", "[")):
        return False
    try:
        json.loads(line, parse_int=str, parse_float=str, parse_constant=str)
    except json.JSONDecodeError as error:
        # What is missing is missing at the end.
        return not line[error.pos :].strip()
    except RecursionError:
        return False
    return False


def _whole(path: Path, *, array: bool) -> _Rows:
    pieces, size = [], 0
    for _, piece in text_lines(path):
        pieces.append(piece)
        size += len(piece)
        if size > _MAX_WHOLE:
            raise UserError(
                f"{path}: more than {_MAX_WHOLE:,} characters; write one object a line (.jsonl)"
            )
    text = "".join(pieces)
    if array and text.lstrip().startswith("["):
        records = read_json(text, of=str(path), parse_numbers_as_text=True, max_bytes=_MAX_WHOLE)
        for number, record in enumerate(records, start=1):
            where = f"{path}, record {number}"
            yield where, _as_object(record, where)
        return
    decoder = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)
    start, line = _skip(text, 0, 1)
    while start < len(text):
        where = f"{path}:{line}"
        try:
            _, end = decoder.raw_decode(text, start)
        except (json.JSONDecodeError, RecursionError):
            end = len(text)
        yield _object(text[start:end], where)
        line += text.count("\n", start, end)
        start, line = _skip(text, end, line)


def _skip(text: str, start: int, line: int) -> tuple[int, int]:
    """The next character that is no blank, and its line."""
    while start < len(text) and text[start].isspace():
        line += text[start] == "\n"
        start += 1
    return start, line
