"""Rows of .csv and .tsv files, as spreadsheets and pandas write them."""

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prompt_tuning_jax.data.tasks.text_rows import MAX_LINE, text_lines
from prompt_tuning_jax.errors import UserError

# The separator of fields, by suffix.
SEPARATORS = {".csv": ",", ".tsv": "\t"}
# Other separators, which programs write in some locales.
_OTHERS = {".csv": (";", "\t", "|"), ".tsv": (",", ";", "|")}
# A tab is hard to type in a shell.
_SPELLINGS = {"\\t": "\t", "tab": "\t"}

# The csv module has one limit per process, which other code may have changed.
_MAX_FIELD = MAX_LINE

_Rows = Iterator[tuple[str, dict[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class _Dialect:
    separator: str
    quoting: Literal[0, 3]
    skip_blanks: bool = False  # between a separator and the next field


def read_table(
    path: Path,
    *,
    ending: str,
    separator: str = "",
    header: bool = True,
    columns: Sequence[str] = (),
) -> _Rows:
    """Yields (FILE:LINE, row) of a table, without blank lines.

    In a .csv file quotes follow RFC 4180, also after blanks if the whole file is consistent with
    that; in a .tsv file they are text, unless all names in the header are quoted.  ``separator``
    overrides that of the suffix; otherwise another separator is used if the header contains it and
    not the usual one.  Columns without a name are left out.  With ``columns``, or without
    ``header``, there is no header line.

    Raises UserError for a line with another number of fields than the header, a repeated name, and
    mismatched quotes.
    """
    dialect = _dialect(path, ending, separator, columns=len(columns))
    header = header and not columns
    names = [name.strip() for name in columns]
    for line, fields in _fields(path, dialect):
        where = f"{path}:{line}"
        if header and not names:
            names = [name.strip() for name in fields]
            _check_names(names, where)
            continue
        if not names:
            names = [str(number) for number in range(len(fields))]
        elif columns and fields == names:
            raise UserError(
                f"{where}: the line names the columns ({', '.join(names)}); remove data.columns"
            )
        needed = max((i + 1 for i, name in enumerate(names) if name), default=0)
        if not needed <= len(fields) <= len(names):
            raise UserError(f"{where}: {_other_number(fields, names, header, columns)}")
        _check_quotes(fields, dialect, where)
        yield where, {name: field for name, field in zip(names, fields) if name}  # noqa: B905


def unnamed_text(path: Path, *, ending: str, separator: str = "") -> int:
    """Returns the number of rows with text in unnamed columns; row numbers do not count."""
    dialect = _dialect(path, ending, separator)
    rows = (fields for _, fields in _fields(path, dialect))
    names = [name.strip() for name in next(rows, [])]
    unnamed = [i for i, name in enumerate(names) if not name]
    if not unnamed:
        return 0

    def holds_text(fields: Sequence[str], i: int) -> bool:
        # pandas writes row numbers as a first column without a name.
        text = fields[i].strip() if i < len(fields) else ""
        return bool(text) and not (i == 0 and text.isdecimal())

    return sum(any(holds_text(fields, i) for i in unnamed) for fields in rows)


def separator_note(
    path: Path, *, ending: str, separator: str = "", columns: Sequence[str] = ()
) -> str:
    """Returns a note on the separator if it is not that of the suffix, or ""."""
    if separator:
        return ""
    detected = _dialect(path, ending, separator, columns=len(columns)).separator
    return "" if detected == SEPARATORS[ending] else f"fields are separated by {detected!r}"


def _check_names(names: Sequence[str], where: str) -> None:
    repeated = {name for name in names if name and names.count(name) > 1}
    if repeated:
        raise UserError(
            f"{where}: the header names {min(repeated)!r} more than once; if the first line is "
            "an example, set data.header=False or name the columns in data.columns"
        )
    if not any(names):
        raise UserError(f"{where}: the header names no column")


def _other_number(
    fields: Sequence[str], names: Sequence[str], header: bool, columns: Sequence[str]
) -> str:
    if columns:
        named = f"data.columns names {len(names)}"
    elif header:
        named = f"the header has {len(names)}"
    else:
        named = f"the first line has {len(names)}"
    return (
        f"{len(fields)} fields where {named} ({', '.join(names)}); quote fields that contain "
        "the separator"
    )


def _check_quotes(fields: Sequence[str], dialect: _Dialect, where: str) -> None:
    if dialect.quoting != csv.QUOTE_MINIMAL or dialect.skip_blanks:
        return
    for field in fields:
        text = field.strip()
        if field[:1].isspace() and len(text) > 1 and text[0] == text[-1] == '"':
            raise UserError(
                f"{where}: the field {field[:40]!r} has a blank before its quotes, which makes "
                "them text, and the file is not consistent otherwise; remove the blanks between "
                "separators and quotes"
            )


def _dialect(path: Path, ending: str, separator: str, *, columns: int = 0) -> _Dialect:
    """Returns the dialect, by the file's suffix and first lines."""
    usual = SEPARATORS[ending]
    separator = _SPELLINGS.get(separator.lower(), separator)
    lines = (line for _, line in text_lines(path) if line.strip())
    first = next(lines, "")
    second = next(lines, "")
    if not separator:
        others = [s for s in _OTHERS[ending] if s in first and usual not in first]
        if columns:
            others = [s for s in others if len(first.split(s)) == columns]
        # A name may contain a semicolon; then the second line usually has none.
        separator = next((s for s in others if not second or s in second), usual)
    tabs = separator == "\t"
    parts = [part.strip() for part in first.rstrip("\r\n").split(separator)]
    in_quotes = all(len(p) > 1 and p[0] == p[-1] == '"' for p in parts)
    quoting: Literal[0, 3] = csv.QUOTE_NONE if tabs and not in_quotes else csv.QUOTE_MINIMAL
    plain = _Dialect(separator=separator, quoting=quoting)
    if quoting == csv.QUOTE_NONE or tabs:
        return plain
    behind_blanks = re.compile(f'(?:^|{re.escape(separator)})[ \t]+"')
    if not any(behind_blanks.search(line) for _, line in text_lines(path)):
        return plain
    skipping = _Dialect(separator=separator, quoting=quoting, skip_blanks=True)
    return skipping if _is_consistent(path, skipping) else plain


def _is_consistent(path: Path, dialect: _Dialect) -> bool:
    """Returns whether all lines have the same number of fields."""
    try:
        numbers = (len(fields) for _, fields in _fields(path, dialect))
        return len(set(numbers)) <= 1
    except UserError:
        return False


def _fields(path: Path, dialect: _Dialect) -> Iterator[tuple[int, list[str]]]:
    """Yields (line, fields) of each line that is not blank."""
    lines = text_lines(path)
    if dialect.quoting == csv.QUOTE_NONE:
        for number, line in lines:
            if text := line.rstrip("\r\n"):
                yield number, text.split(dialect.separator)
        return
    table = csv.reader(
        (line for _, line in lines),
        delimiter=dialect.separator,
        quoting=dialect.quoting,
        skipinitialspace=dialect.skip_blanks,
        strict=True,
    )
    fields: list[str] | None = []
    while fields is not None:
        limit = csv.field_size_limit(_MAX_FIELD)
        try:
            fields = next(iter(table), None)
        except csv.Error as error:
            raise UserError(f"{path}:{table.line_num}: {error}") from None
        finally:
            csv.field_size_limit(limit)
        if fields:
            yield table.line_num, fields
