"""Lines of a text file in the encodings and line ends that people's programs write."""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeAlias

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.untrusted_input import require_whole

# Numbered from 1, each with its end.
NumberedLines: TypeAlias = Iterator[tuple[int, str]]

MAX_LINE = 64 * 2**20  # characters; a longer one is a damaged file, or another kind of file
_HEAD = 1 << 20  # bytes that the encoding and the line ends are told by

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
    """The file's bytes, unpacked where its name ends in .gz; UserError if it cannot be opened."""
    require_whole(path)
    opener: Callable[..., Any] = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        opened: IO[bytes] = opener(path, "rb")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    return opened


def chunks(file: IO[bytes], path: Path, *, size: int = 1 << 20) -> Iterator[bytes]:
    """The rest of an open file, piece by piece; UserError where it is damaged."""
    while chunk := _reading(lambda: file.read(size), path):
        yield chunk


def text_lines(path: Path) -> NumberedLines:
    """Yield the lines of a text file, without a byte order mark.

    Raises UserError for a file that is missing, damaged, of another kind, or not UTF-8 (UTF-16 and
    UTF-32 are read where they begin with a byte order mark), and for a line over ``MAX_LINE``.
    """
    with open_bytes(path) as file:
        head = _reading(lambda: file.read(_HEAD), path)
    encoding = _encoding(head, path)
    newline = _newline(head, encoding)
    with open_bytes(path) as file:
        # Bytes that are not UTF-8 come as half characters, so that the message can locate them.
        errors = "surrogateescape" if encoding == "utf-8" else "strict"
        text = io.TextIOWrapper(file, encoding=encoding, errors=errors, newline=newline)
        number = 0
        while line := _reading(lambda: text.readline(MAX_LINE + 1), path):
            number += 1
            if len(line) > MAX_LINE:
                raise UserError(
                    f"{path}:{number}: a line of more than {MAX_LINE:,} characters; "
                    "is the file what its name says?"
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
            f"{path}: begins with the byte order mark of {error.encoding} and is not valid "
            f"{error.encoding}: {error.reason}; it may be cut off"
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
            f"{path}: is {order} without a byte order mark, or no text; save it as UTF-8, for "
            f"instance iconv -f {order} -t UTF-8 {path.name} > new{path.suffix}"
        )
    return "utf-8"


def _newline(head: bytes, encoding: str) -> str:
    """What ends a line: a line feed, or a carriage return in a file that has no line feed."""
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
