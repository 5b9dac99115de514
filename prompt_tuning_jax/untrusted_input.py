"""Input that may be damaged or hostile: JSON, files that claim more than they hold, patterns.

JSON: Python's reader fails with four kinds of exception and accepts ``NaN`` and lone surrogates,
and its writer produces both.  Here invalid input is a UserError of one line, and output is always
valid.

Files: the bytes that a file or folder claims to hold are compared with the bytes on the disk.

Patterns: RE2 matches regular expressions in time linear in the length of the text.  Python's
``re`` can take exponential time for a short pattern.
"""

import functools
import json
import math
import numbers
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import re2

from prompt_tuning_jax.errors import UserError

MAX_BYTES = 64 * 2**20
MAX_DEPTH = 64
_MAX_DIGITS = 300  # more do not fit a float64, and Python's own int stops at 4300
_MAX_CONTAINERS = 2**21  # an empty list takes 2 characters in the file and 64 bytes in memory
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class NumberText(str):
    """A number in the spelling of its JSON text; ``json_text`` writes it as a number."""


def json_type(value: Any) -> str:
    """Names a decoded value as JSON does, with its article: ``an object``, ``a number``."""
    if isinstance(value, NumberText | int | float) and not isinstance(value, bool):
        return "a number"
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    return "null" if value is None else names[type(value)]


def read_json(
    text: str | bytes,
    *,
    of: str,
    parse_numbers_as_text: bool = False,
    max_bytes: int = MAX_BYTES,
) -> Any:
    """Returns the value of a JSON text.

    With ``parse_numbers_as_text``, numbers are returned as ``NumberText``, as they are spelled, and
    ``NaN``, which Python and pandas write for a missing value, as None.  Raises UserError, in one
    line that begins with ``of`` (a file or field), for a text that is not UTF-8 or not JSON, is
    longer than ``max_bytes`` (characters, for a str), is nested deeper than 64 levels, or has a
    number that is not finite or has too many digits, or a lone surrogate.
    """
    if len(text) > max_bytes:
        raise UserError(
            f"{of}: {len(text)} bytes of JSON are too large; at most {max_bytes} are read"
        )
    decoded = _decode(text, of) if isinstance(text, bytes) else text
    if decoded.count("[") + decoded.count("{") > _MAX_CONTAINERS:
        raise UserError(f"{of}: more than {_MAX_CONTAINERS} arrays and objects")
    try:
        if parse_numbers_as_text:
            value = json.loads(
                decoded,
                parse_int=NumberText,
                parse_float=NumberText,
                parse_constant=lambda name: None if name == "NaN" else name,
            )
        else:
            value = json.loads(
                decoded,
                parse_int=functools.partial(_int, of),
                parse_float=functools.partial(_float, of),
                parse_constant=functools.partial(_refuse_constant, of),
            )
    except json.JSONDecodeError as error:
        raise UserError(
            f"{of}: invalid or truncated JSON: {error.msg} at line {error.lineno}, "
            f"character {error.colno}"
        ) from None
    except RecursionError:
        raise UserError(_too_deep(of)) from None
    if decoded.count("[") + decoded.count("{") > MAX_DEPTH and _is_deeper(value, MAX_DEPTH):
        raise UserError(_too_deep(of))
    # Only an escape, or a str that was not decoded here, can contain a lone surrogate.
    if (_ESCAPED_SURROGATE.search(decoded) or has_surrogate(decoded)) and any(
        map(has_surrogate, _texts(value))
    ):
        raise UserError(f"{of}: a \\ud... escape is half of a surrogate pair")
    return value


def read_json_file(path: Path, *, of: str | None = None, max_bytes: int = MAX_BYTES) -> Any:
    """Returns the value of a JSON file; at most ``max_bytes`` are read.

    Raises UserError as ``read_json`` does (``of`` defaults to the path), and for a file that cannot
    be read.
    """
    of = str(path) if of is None else of
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise UserError(f"{of}: {error.strerror or error}") from None
    if len(data) > max_bytes:
        raise UserError(f"{of}: too large; at most {max_bytes} bytes of JSON are read")
    return read_json(data, of=of, max_bytes=max_bytes)


def json_text(value: Any, *, indent: int | None = None, sort_keys: bool = False) -> str:
    """Returns valid JSON of a value.

    NaN and infinities become null, and non-ASCII text is not escaped.

    NumPy numbers are written like Python's.  Raises TypeError for a value that JSON has no form of.
    """
    text = json.dumps(
        _finite(value), indent=indent, sort_keys=sort_keys, ensure_ascii=False, allow_nan=False
    )
    # A lone surrogate (from a file name in a broken encoding) cannot be written as UTF-8.
    return _LONE_SURROGATE.sub(lambda half: f"\\u{ord(half[0]):04x}", text)


def _decode(data: bytes, of: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{of}: byte {error.start + 1} (0x{data[error.start]:02x}) is not UTF-8"
        ) from None


def _int(of: str, digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise UserError(f"{of}: a number has {len(digits)} digits; at most 300 are read")
    return int(digits)


def _float(of: str, digits: str) -> float:
    if len(digits) > _MAX_DIGITS:
        raise UserError(f"{of}: a number has {len(digits)} digits; at most 300 are read")
    number = float(digits)
    if not math.isfinite(number):
        raise UserError(f"{of}: the number {digits[:40]} is too large")
    return number


def _refuse_constant(of: str, name: str) -> NoReturn:
    raise UserError(f"{of}: {name} is not JSON; write null or a number")


def _too_deep(of: str) -> str:
    return f"{of}: arrays and objects are nested deeper than {MAX_DEPTH} levels"


def _is_deeper(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            child
            for each in level
            if isinstance(each, list | dict)
            for child in (each.values() if isinstance(each, dict) else each)
        ]
    return any(isinstance(each, list | dict) for each in level)


def _texts(value: Any) -> list[str]:
    texts, rest = [], [value]
    while rest:
        each = rest.pop()
        if isinstance(each, str):
            texts.append(each)
        elif isinstance(each, list):
            rest.extend(each)
        elif isinstance(each, dict):
            texts.extend(each)
            rest.extend(each.values())
    return texts


def has_surrogate(text: str) -> bool:
    """Returns whether a text has a lone surrogate, which UTF-8 cannot represent."""
    return not text.isascii() and _LONE_SURROGATE.search(text) is not None


def _finite(value: Any) -> Any:
    if isinstance(value, NumberText):
        number = float(value)
        whole = int(value) if value.lstrip("-").isdigit() and len(value) <= _MAX_DIGITS else number
        return whole if math.isfinite(number) else None
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, Sequence):
        return [_finite(each) for each in value]
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    return value


# Trained weights never compress this well.
_MAX_COMPRESSION = 100
_ALWAYS_ALLOWED = 2**28  # bytes that any file may claim
# Of zarr's formats; TensorStore reads them whole.
_HEADERS = (".zarray", ".zattrs", ".zgroup", "zarr.json")
_MAX_HEADER_BYTES = 2**24


def stored_bytes(path: Path) -> int:
    """Returns the bytes on the disk of a file, or of all files below a folder.

    Holes in sparse files count 0.

    Links are followed, because a cache may keep its files elsewhere.
    """
    files = path.rglob("*") if path.is_dir() else [path]
    total = 0
    for file in files:
        try:
            status = os.stat(file)
        except OSError:
            continue
        if file.is_file():
            total += min(status.st_size, getattr(status, "st_blocks", status.st_size) * 512)
    return total


def require_stored(claimed: int, stored: int, *, of: str) -> None:
    """Raises UserError if far more bytes are claimed than compression can explain."""
    if claimed > max(_ALWAYS_ALLOWED, _MAX_COMPRESSION * stored):
        raise UserError(
            f"{of} claims {claimed} bytes, but only {stored} are stored: the copy is incomplete or "
            "damaged"
        )


def require_whole(path: Path) -> None:
    """Raises UserError for a file that is nearly all holes, like an unfinished copy.

    Every file in a folder is checked.  A header that is far too long is an error, too.
    """
    for file in path.rglob("*") if path.is_dir() else [path]:
        try:
            size = file.stat().st_size
        except OSError:
            continue  # opening it reports the error
        if size > _ALWAYS_ALLOWED:
            require_stored(size, stored_bytes(file), of=str(file))
        if size > _MAX_HEADER_BYTES and file.name in _HEADERS:
            raise UserError(f"{file} has {size} bytes; a header has at most {_MAX_HEADER_BYTES}")


_MAX_BYTES = 1 << 23  # of a compiled pattern


def compile_pattern(pattern: str, *, of: str) -> Any:
    """Returns a compiled expression in RE2's syntax.

    It is that of ``re`` without lookaround and backreferences.

    Its ``fullmatch`` tells whether a whole path matches.  Raises UserError, which begins with
    ``of`` (a field), for an invalid or too large expression.
    """
    try:
        return _compiled(pattern)
    except (re2.error, UnicodeEncodeError) as error:
        why = str(error)
        if error.args and isinstance(error.args[0], bytes):
            why = error.args[0].decode(errors="replace")
        raise UserError(
            f"{of}: {shown(pattern)} is not a valid regular expression (RE2 syntax): {why[:80]}"
        ) from None


def shown(pattern: str) -> str:
    """Returns a pattern as messages quote it."""
    return repr(pattern) if len(pattern) <= 80 else f"{pattern[:77]!r}..."


@functools.lru_cache(maxsize=1024)
def _compiled(pattern: str) -> Any:
    options = re2.Options()
    options.log_errors = False
    options.max_mem = _MAX_BYTES
    return re2.compile(pattern, options=options)
