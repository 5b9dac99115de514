"""Reads lines of text files, and rows of JSON files.

Text may have any common encoding and line ends.  JSON is an object per line, one array of objects,
or objects one after another.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeAlias

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.untrusted_input import json_type, read_json, require_whole

# Numbered from 1, each with its line end.
NumberedLines: TypeAlias = Iterator[tuple[int, str]]

MAX_LINE = 64 * 2**20  # characters; longer lines mean a damaged file, or another kind of file
_HEAD = 1 << 20  # bytes that determine the encoding and the line ends

_BYTE_ORDER_MARKS = (
    (b"\xff\xfe\0\0", "utf-32"),
    (b"\0\0\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_OTHER_KINDS = (
    (b"PK\x03\x04", "a zip archive, as .xlsx is; save it as CSV UTF-8"),
    (b"\xd0\xcf\x11\xe0", "an old Excel file; save it as CSV UTF-8"),
    (b"\x1f\x8b", "compressed with gzip; name it so that it ends in .gz"),
    (b"PAR1", "a parquet file; name it .parquet"),
)


def open_bytes(path: Path) -> IO[bytes]:
    """Returns the file's bytes, decompressed if its suffix is .gz.

    Raises UserError if it cannot be opened.
    """
    require_whole(path)
    opener: Callable[..., Any] = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        stream: IO[bytes] = opener(path, "rb")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    return stream


def chunks(file: IO[bytes], path: Path, *, size: int = 1 << 20) -> Iterator[bytes]:
    """Yields the rest of an open file, in chunks; UserError if it is damaged."""
    while chunk := _reading(lambda: file.read(size), path):
        yield chunk


def text_lines(path: Path) -> NumberedLines:
    """Yields the lines of a text file, without a byte order mark.

    Raises UserError for a file that is missing, damaged, of another kind, or not UTF-8 (or UTF-16
    or UTF-32 with a byte order mark), and for a line over ``MAX_LINE``.
    """
    with open_bytes(path) as file:
        head = _reading(lambda: file.read(_HEAD), path)
    encoding = _encoding(head, path)
    newline = _newline(head, encoding)
    with open_bytes(path) as file:
        # Bytes that are not UTF-8 are decoded as surrogates, so that the message can locate them.
        errors = "surrogateescape" if encoding == "utf-8" else "strict"
        text = io.TextIOWrapper(file, encoding=encoding, errors=errors, newline=newline)
        number = 0
        while line := _reading(lambda: text.readline(MAX_LINE + 1), path):
            number += 1
            if len(line) > MAX_LINE:
                raise UserError(
                    f"{path}:{number}: a line has more than {MAX_LINE:,} characters; "
                    "does the file have the format of its suffix?"
                )
            if encoding == "utf-8" and not line.isascii():
                _require_utf8(line, path, number)
                line = line.removeprefix("\ufeff") if number == 1 else line
            yield number, line


def _reading(read: Callable[[], Any], path: Path) -> Any:
    try:
        return read()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: has the byte order mark of {error.encoding} but is not valid "
            f"{error.encoding}: {error.reason}; it may be truncated"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _encoding(head: bytes, path: Path) -> str:
    for mark, encoding in _BYTE_ORDER_MARKS:
        if head.startswith(mark):
            return encoding
    for magic, kind in _OTHER_KINDS:
        if head.startswith(magic):
            raise UserError(f"{path}: is {kind}")
    first = head[:400]
    if len(first) > 3 and first.count(0) > len(first) // 4:
        order = "UTF-16LE" if not first[0::2].count(0) > first[1::2].count(0) else "UTF-16BE"
        raise UserError(
            f"{path}: is {order} without a byte order mark, or not text; save it as UTF-8, for "
            f"instance iconv -f {order} -t UTF-8 {path.name} > new{path.suffix}"
        )
    return "utf-8"


def _newline(head: bytes, encoding: str) -> str:
    """Returns the line end: a line feed, or a carriage return in a file without line feeds."""
    text = head if encoding == "utf-8" else head.decode(encoding, errors="ignore").encode()
    return "\r" if b"\r" in text and b"\n" not in text else "\n"


def _require_utf8(line: str, path: Path, number: int) -> None:
    try:
        line.encode()
    except UnicodeEncodeError as error:
        place = len(line[: error.start].encode()) + 1
        byte = ord(line[error.start]) - 0xDC00
        new = "".join(Path(path.name.removesuffix(".gz")).suffixes)
        raise UserError(
            f"{path}:{number}: byte {place} of the line (0x{byte:02x}) is not UTF-8; convert the "
            f"file, for instance iconv -f latin1 -t utf-8 {path.name} > new{new}"
        ) from None


# Characters of a file with one value, or with values over several lines, which is read as a whole.
_MAX_WHOLE = 512 * 2**20

_Rows = Iterator[tuple[str, dict[str, Any]]]


def read_json_lines(path: Path) -> _Rows:
    """Yields one object per line; objects over several lines are read, too."""
    return _rows(path, array=False)


def read_json_records(path: Path) -> _Rows:
    """Yields the objects of an array, or of a file that holds one after another."""
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
        f"{where}: {json_type(value)} where an object is expected; "
        'write one {"column": value} per line (use .json for an array of objects)'
    )


def _is_part_of_a_value(line: str) -> bool:
    """Returns whether a value begins on this line and does not end on it."""
    if not line.lstrip().startswith(("{", "[")):
        return False
    try:
        json.loads(line, parse_int=str, parse_float=str, parse_constant=str)
    except json.JSONDecodeError as error:
        # An incomplete value is invalid only at its end.
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
                f"{path}: more than {_MAX_WHOLE:,} characters; write one object per line (.jsonl)"
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
    """Returns the position of the next character that is not white space, and its line."""
    while start < len(text) and text[start].isspace():
        line += text[start] == "\n"
        start += 1
    return start, line
