"""Rows of a user's files: JSON, tables, parquet, and folders of the ``datasets`` library."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from prompt_tuning_jax.data.tasks import arrow_rows, table_rows, text_rows
from prompt_tuning_jax.data.tasks.text_rows import chunks, open_bytes
from prompt_tuning_jax.errors import UserError

# The location of a row for messages (FILE:LINE or "FILE, row N"), and its values by column.
LocatedRow: TypeAlias = tuple[str, dict[str, Any]]

# Part of every fingerprint: change it whenever the same bytes are read as different rows.
_VERSION = "rows 3"


@dataclass(frozen=True, kw_only=True)
class RowFile:
    """A file of rows, whose format follows from its suffix; opened only when it is read.

    ``.jsonl`` (``.ndjson``; one object per line), ``.json`` (an array of objects, or objects one
    after another), ``.csv`` and ``.tsv``, each also with ``.gz``; ``.parquet``; ``.arrow``; and a
    folder that ``datasets`` wrote with ``save_to_disk``.  Text is UTF-8, or UTF-16 with a byte
    order mark; lines end with a line feed, a carriage return, or both.

    Attributes:
      path: the file or folder.
      header: whether the first line of a table names its columns; otherwise they are 0, 1, ...
      columns: the names of the columns of a table without such a line.
      separator: between the fields of a table; empty: a comma in .csv, a tab in .tsv, or another
        separator that the first lines clearly use.
      split: of a folder with several.
    """

    path: Path
    header: bool = True
    columns: tuple[str, ...] = ()
    separator: str = ""
    split: str = ""

    def rows(self) -> Iterator[LocatedRow]:
        """Yields the location of each row, and the row.

        JSON numbers are text, as they are spelled, and nan is null; ``value_text`` converts all
        values to text.
        UserError, which names the file and the line, for missing, unknown or malformed files.
        """
        return self._reader()(self)

    @property
    def title(self) -> str:
        """The name of the file in messages."""
        return str(self.path)

    @property
    def is_table(self) -> bool:
        """Whether its first line may name the columns."""
        return self._ending() in table_rows.SEPARATORS

    def fingerprint(self) -> str:
        """Returns a string that changes with the bytes, and with how they are read."""
        options = (self._ending(), self.header, self.columns, self.separator, self.split)
        digest = hashlib.sha256(repr((_VERSION, options)).encode())
        for path in (
            arrow_rows.files_of(self.path, self.split) if self.path.is_dir() else [self.path]
        ):
            with open_bytes(path) as file:
                for chunk in chunks(file, path):
                    digest.update(chunk)
        return digest.hexdigest()

    def _reader(self) -> "Callable[[RowFile], Iterator[LocatedRow]]":
        if self.path.is_dir() and self._ending() not in _READERS:
            return _read_folder
        reader = _READERS.get(self._ending())
        if reader is None:
            raise UserError(
                f"{self.path}: unknown format; use a file with the suffix "
                f"{', '.join(_LISTED)} (text formats also with .gz), or a folder written by "
                "datasets' save_to_disk"
            )
        return reader

    def notes(self) -> Iterator[str]:
        """Remarks about the file to report, one line each."""
        if not self.is_table:
            return
        named = self.header and not self.columns
        kind = {"ending": self._ending(), "separator": self.separator}
        if note := table_rows.separator_note(self.path, **kind, columns=self.columns):
            yield f"{self.path}: {note}"
        if named and (number := table_rows.unnamed_text(self.path, **kind)):
            yield (
                f"{self.path}: {number:,} row{'s' * (number != 1)} with text in columns without a "
                "name, which is ignored"
            )

    def _ending(self) -> str:
        name = self.path.name.lower().removesuffix(".gz")
        return name[name.rfind(".") :] if "." in name else ""


def is_row_file(path: Path) -> bool:
    """Returns whether this is a file or folder of rows, not lines of text, by its suffix."""
    file = RowFile(path=path)
    return file._ending() in _READERS or path.is_dir()


def read_rows(
    path: str | Path,
    *,
    header: bool = True,
    columns: Sequence[str] = (),
    separator: str = "",
    split: str = "",
) -> Iterator[LocatedRow]:
    """Yields (location, row) of a file; see ``RowFile``."""
    file = RowFile(
        path=Path(path), header=header, columns=tuple(columns), separator=separator, split=split
    )
    return file.rows()


def value_text(value: object, column: str, where: str = "") -> str:
    """Returns a value of a row as text.

    Raises UserError, which begins with ``where``, for an array or an object.

    Booleans become ``True`` and ``False``, and null an empty text.
    """
    if isinstance(value, str):  # also JSON numbers, as they are spelled
        return value
    if value is None:
        return ""
    if isinstance(value, bool | int | float):
        return str(value)
    raise UserError(
        f"{where}{': ' if where else ''}column {column!r} is a {type(value).__name__}; "
        "it must be a text, a number, true, false or null"
    )


def _read_table(file: RowFile) -> Iterator[LocatedRow]:
    return table_rows.read_table(
        file.path,
        separator=file.separator,
        ending=file._ending(),
        header=file.header,
        columns=file.columns,
    )


def _read_folder(file: RowFile) -> Iterator[LocatedRow]:
    return arrow_rows.read_folder(file.path, file.split)


_READERS: Mapping[str, Callable[[RowFile], Iterator[LocatedRow]]] = {
    ".jsonl": lambda file: text_rows.read_json_lines(file.path),
    ".ndjson": lambda file: text_rows.read_json_lines(file.path),
    ".json": lambda file: text_rows.read_json_records(file.path),
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": lambda file: arrow_rows.read_parquet(file.path),
    ".arrow": lambda file: arrow_rows.read_arrow(file.path),
}
_LISTED = (".jsonl", ".csv", ".tsv", ".json", ".parquet", ".arrow")
