"""A task made of a user's own .jsonl, .csv or .tsv files."""

import csv
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias

from prompt_tuning_jax.data.metrics import get_metric
from prompt_tuning_jax.data.suggest import suggest
from prompt_tuning_jax.data.task import Row, Source, Task
from prompt_tuning_jax.data.text_template import TextTemplate, column_template, parse_template
from prompt_tuning_jax.errors import UserError

# More distinct targets than this in the training file are text, not labels to choose between.
MAX_LABELS = 50

# A reader: numbered lines of text and the file's name for messages -> numbered rows.
_NumberedLines: TypeAlias = Iterator[tuple[int, str]]
_Reader: TypeAlias = Callable[[_NumberedLines, str], Iterator[tuple[int, dict[str, Any]]]]


def file_task(
    *,
    train: str = "",
    eval: str = "",  # the names of experiment.Data's fields
    train_split: str = "train",
    eval_split: str = "validation",
    inputs_column: str = "inputs",
    targets_column: str = "targets",
    inputs_template: str = "",
    targets_template: str = "",
    labels: Sequence[str] = (),
    metrics: Sequence[str] = (),
) -> Task:
    """Make a task of one or two files; the arguments are the fields of ``experiment.Data``.

    Files are UTF-8 (with or without a byte order mark), their ending tells the format: ``.jsonl``
    (an object a line), ``.csv`` (a header line; quotes as in RFC 4180), ``.tsv`` (a header line; a
    tab always separates, quotes are text), each also with ``.gz`` behind it.  Numbers and booleans
    become text: JSON numbers as they are written, booleans ``True`` and ``False``, null an empty
    string.  Blank lines are passed over, and so are blanks around a target.  Every column of a row
    stays with its example.

    Without ``labels`` the distinct targets of the training file are the labels, in alphabetical
    order, when there are at most 50 of them; else the targets are free text.  (Without a
    training file, those of the evaluation file.)  With ``labels`` every target must be one of
    them.  Without ``metrics`` it is accuracy.

    Raises UserError, now or when the rows are read, naming file and line: a file that is missing,
    empty, of an unknown format, not UTF-8 or malformed, a missing column, an empty target.
    """
    files = {split: Path(p) for split, p in ((train_split, train), (eval_split, eval)) if p}
    if not files:
        raise UserError("neither data.train nor data.eval names a file")
    if train and eval and train_split == eval_split:
        raise UserError(f"data.train_split and data.eval_split are both {train_split!r}")
    templates = {
        "inputs": _template(inputs_template, inputs_column, "data.inputs_template"),
        "targets": _template(targets_template, targets_column, "data.targets_template"),
    }
    read = partial(_examples, templates=templates, labels=tuple(labels))
    if not labels:
        labels = _distinct_targets(read(files.get(train_split) or files[eval_split]))
    return Task(
        name="file:" + next(iter(files.values())).name,
        source=Source(
            splits=tuple(files),
            rows=lambda split, data_dir: read(files[split]),
            fingerprint=lambda split, data_dir: _fingerprint(files[split], templates),
            titles={split: str(path) for split, path in files.items()},
        ),
        labels=tuple(labels),
        metrics=tuple(get_metric(name, labels=labels) for name in metrics or ("accuracy",)),
        description=", ".join(f"{split}: {path}" for split, path in files.items()),
    )


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, row) of a .jsonl, .csv or .tsv file, .gz or not; UserError as above."""
    reader = _READERS.get(_format(path))
    if reader is None:
        raise UserError(
            f"{path}: unknown kind of file; its name must end in {', '.join(_READERS)} "
            "(or that and .gz)"
        )
    return reader(_text_lines(path), str(path))


def _template(template: str, column: str, field: str) -> TextTemplate:
    return parse_template(template, field=field) if template else column_template(column)


def _format(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return name[name.rfind(".") :] if "." in name else ""


def _examples(
    path: Path, *, templates: Mapping[str, TextTemplate], labels: tuple[str, ...]
) -> Iterator[Row]:
    empty = True
    for line, row in read_rows(path):
        empty = False
        where = f"{path}:{line}"
        values = {column: _as_text(value, column, where) for column, value in row.items()}
        # A table's columns are named in its first line.
        named = where if _format(path) == ".jsonl" else f"{path}:1"
        inputs = _render(templates["inputs"], values, named, side="inputs")
        target = _render(templates["targets"], values, named, side="targets").strip()
        if not target:
            raise UserError(f"{where}: the target is empty; fill it in or remove the line")
        if labels and target not in labels:
            raise UserError(
                f"{where}: the target {target!r} is not in data.labels: {suggest(target, labels)}"
            )
        yield {**values, "inputs": inputs, "targets": target}
    if empty:
        raise UserError(f"{path}: holds no examples")


def _as_text(value: Any, column: str, where: str) -> str:
    if isinstance(value, str):  # JSON numbers too: they are read as they are written
        return value
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value)
    raise UserError(
        f"{where}: column {column!r} holds a {type(value).__name__}; "
        "a text, a number, true, false or null is needed"
    )


def _render(template: TextTemplate, values: Mapping[str, str], where: str, *, side: str) -> str:
    for column in template.columns:
        if column not in values:
            raise UserError(
                f"{where}: no column {column!r}: {suggest(column, values)}; say which one with "
                f"--set data.{side}_column=NAME, or several with data.{side}_template"
            )
    return template.render(values)


def _distinct_targets(rows: Iterator[Row]) -> tuple[str, ...]:
    distinct = {row["targets"] for row in rows}  # reads on to the end: every line is checked
    return tuple(sorted(distinct)) if len(distinct) <= MAX_LABELS else ()


def _fingerprint(path: Path, templates: Mapping[str, TextTemplate]) -> str:
    digest = hashlib.sha256(repr(sorted(templates.items())).encode())
    digest.update(_format(path).encode())
    with _open(path) as file:
        while chunk := _read(file, path):
            digest.update(chunk)
    return digest.hexdigest()


def _open(path: Path) -> IO[bytes]:
    opener: Callable[..., Any] = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        opened: IO[bytes] = opener(path, "rb")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    return opened


def _read(file: IO[bytes], path: Path, size: int = 1 << 20, *, line: bool = False) -> bytes:
    try:
        return file.readline() if line else file.read(size)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _text_lines(path: Path) -> _NumberedLines:
    number = 0
    with _open(path) as file:
        while line := _read(file, path, line=True):
            number += 1
            try:
                # Only the first line can begin with a byte order mark.
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}:{number}: byte {error.start + 1} of the line "
                    f"(0x{line[error.start]:02x}) is not UTF-8; convert the file, for instance "
                    f"iconv -f latin1 -t utf-8 {path.name} > new{_format(path)}"
                ) from None


def _read_jsonl(lines: _NumberedLines, path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_int=str, parse_float=str, parse_constant=str)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}:{number}: not JSON, or cut off: {error.msg} at character {error.pos + 1}"
            ) from None
        except RecursionError as error:
            raise UserError(f"{path}:{number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(
                f"{path}:{number}: a {type(row).__name__} where an object is needed; "
                'write one {"column": value} a line'
            )
        if "\\ud" in line.lower() and not _is_text(line):
            raise UserError(f"{path}:{number}: a \\ud... escape that is half a character")
        yield number, row


def _is_text(line: str) -> bool:
    try:
        json.dumps(json.loads(line), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_table(
    lines: _NumberedLines, path: str, *, separator: str, quoting: Literal[0, 3]
) -> Iterator[tuple[int, dict[str, Any]]]:
    table = csv.reader(
        (line for _, line in lines), delimiter=separator, quoting=quoting, strict=True
    )
    header: list[str] = []
    while True:
        try:
            fields = next(table, None)
        except csv.Error as error:
            raise UserError(f"{path}:{table.line_num}: {error}") from None
        if fields is None:
            return
        if not fields:  # a blank line
            continue
        if not header:
            header = [name.strip() for name in fields]
            repeated = {name for name in header if header.count(name) > 1}
            if repeated:
                raise UserError(
                    f"{path}:{table.line_num}: the header names {min(repeated)!r} more than once"
                )
            continue
        if len(fields) != len(header):
            raise UserError(
                f"{path}:{table.line_num}: {len(fields)} fields where the header has "
                f"{len(header)} ({', '.join(header)})"
            )
        yield table.line_num, dict(zip(header, fields, strict=True))


_READERS: Mapping[str, _Reader] = {
    ".jsonl": _read_jsonl,
    ".csv": partial(_read_table, separator=",", quoting=csv.QUOTE_MINIMAL),
    ".tsv": partial(_read_table, separator="\t", quoting=csv.QUOTE_NONE),
}
