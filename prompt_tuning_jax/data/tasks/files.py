"""A task made of a user's own files."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

from prompt_tuning_jax.config.text_template import TextTemplate, column_template, parse_template
from prompt_tuning_jax.data.tasks.metrics import get_metric
from prompt_tuning_jax.data.tasks.row_files import RowFile, value_text
from prompt_tuning_jax.data.tasks.task import Row, Source, Task
from prompt_tuning_jax.errors import UserError, suggest

# More distinct targets than this in the training file are text, not labels to choose between.
MAX_LABELS = 50
# Among this few rows labels may all differ; longer targets than this many words are text.
_FEW_ROWS = 4
_SHORT_WORDS = 3

# What the name of a task of files begins with.
FILE_TASK = "file:"

TargetKind: TypeAlias = Literal["auto", "labels", "text"]


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
    targets: TargetKind = "auto",
    allow_empty_targets: bool = False,
    labels: Sequence[str] = (),
    metrics: Sequence[str] = (),
    header: bool = True,
    columns: Sequence[str] = (),
    separator: str = "",
) -> Task:
    """Make a task of one or two files; the arguments are the fields of ``experiment.Data``.

    ``data.row_files`` tells which files there are and how they are read.  Numbers and booleans
    become text: JSON numbers as they are written, booleans ``True`` and ``False``, null an empty
    string.  Blanks around a target are passed over.  Every column of a row stays with its example,
    of whatever type it is; those that a template names must be text, numbers or booleans.

    With ``labels`` every target must be one of them.  Without, the targets of the training file
    are labels, in alphabetical order, or text (``targets``); ``auto`` decides by how many there are
    and how often they repeat (``are_labels``), and the task's ``notes`` say what was decided.
    Without a training file there are no labels: those of an evaluation file need not be all.
    Without ``metrics`` it is accuracy.

    Raises UserError, now or when the rows are read, naming file and line: a file that is missing,
    empty, of an unknown format, not text or malformed, a missing column, an empty target.
    """
    files = _row_files(
        train, eval, train_split, eval_split, header=header, columns=columns, separator=separator
    )
    sides = _sides(inputs_column, targets_column, inputs_template, targets_template)
    read = partial(
        _examples,
        inputs=sides[0],
        targets=sides[1],
        labels=tuple(labels),
        allow_empty=allow_empty_targets,
    )
    notes: tuple[str, ...] = ()
    if not labels and train and targets != "text":
        evaluation = files.get(eval_split)
        # At prediction the file may be gone.
        seen = evaluation is not None and evaluation.path.exists()
        labels, notes = _labels_of(
            read(files[train_split]),
            (lambda: read(files[eval_split])) if seen else None,
            targets,
        )
    return Task(
        name=FILE_TASK + next(iter(files.values())).path.name,
        source=Source(
            splits=tuple(files),
            rows=lambda split, data_dir: read(files[split]),
            fingerprint=lambda split, data_dir: _fingerprint(files[split], sides),
            display_names={split: file.title for split, file in files.items()},
        ),
        labels=tuple(labels),
        metrics=tuple(get_metric(name, labels=labels) for name in metrics or ("accuracy",)),
        description=", ".join(f"{split}: {file.path}" for split, file in files.items()),
        notes=notes
        + tuple(n for file in files.values() if file.path.exists() for n in file.notes()),
    )


def check_file_columns(
    *,
    train: str,
    eval: str,
    train_split: str,
    eval_split: str,
    inputs_column: str,
    targets_column: str,
    inputs_template: str,
    targets_template: str,
    header: bool,
    columns: Sequence[str],
    separator: str,
) -> None:
    """UserError unless the files are there, hold a row, and that has the columns asked for."""
    files = _row_files(
        train, eval, train_split, eval_split, header=header, columns=columns, separator=separator
    )
    inputs, targets = _sides(inputs_column, targets_column, inputs_template, targets_template)
    for file in files.values():  # all of them, before any is read
        if not file.path.exists():
            raise UserError(f"{file.path}: there is no such file")
    for file in files.values():
        where, row = next(file.rows(), ("", None))
        if row is None:
            raise UserError(f"{file.path}: holds no examples")
        _require_columns(file, row, where, inputs=inputs, targets=targets)


def _row_files(
    train: str,
    eval: str,
    train_split: str,
    eval_split: str,
    *,
    header: bool,
    columns: Sequence[str],
    separator: str,
) -> dict[str, RowFile]:
    """The files by split."""
    if train and eval and train_split == eval_split:
        raise UserError(f"data.train_split and data.eval_split are both {train_split!r}")
    files = {
        split: RowFile(
            path=Path(path),
            split=split,
            header=header,
            columns=tuple(columns),
            separator=separator,
        )
        for split, path in ((train_split, train), (eval_split, eval))
        if path
    }
    if not files:
        raise UserError("neither data.train nor data.eval names a file")
    if (not header or columns or separator) and not any(f.is_table for f in files.values()):
        raise UserError(
            "data.header, data.columns and data.separator are for .csv and .tsv files, and "
            f"{next(iter(files.values())).title} is none"
        )
    return files


def _sides(
    inputs_column: str, targets_column: str, inputs_template: str, targets_template: str
) -> tuple[TextTemplate, TextTemplate]:
    return (
        _template(inputs_template, inputs_column, "data.inputs_template"),
        _template(targets_template, targets_column, "data.targets_template"),
    )


def are_labels(train: Mapping[str, int], evaluation: Mapping[str, int] | None = None) -> bool:
    """Whether targets are labels to choose between, by how often each occurs.

    They are text where there are more than ``MAX_LABELS``; where most rows have a target that no
    other row has; where there are more than ten and they are long; and where most rows to evaluate
    on have a target of their own that the training file lacks.  Of a few rows, targets of a word or
    three are labels, and so are those that the rows to evaluate on repeat.
    """
    if len(train) > MAX_LABELS:
        return False
    known = evaluation or {}
    outside = sum(number for target, number in known.items() if target not in train)
    repeats = not _mostly_once(known)
    if known and not repeats and 2 * outside > sum(known.values()) > _FEW_ROWS:
        return False
    words = sorted(len(target.split()) for target in train)
    if len(train) > 10 and words[len(words) // 2] >= 8:
        return False
    if not _mostly_once(train):
        return True
    if known and repeats and not outside:
        return True
    return sum(train.values()) <= _FEW_ROWS and words[-1] <= _SHORT_WORDS


def _mostly_once(counts: Mapping[str, int]) -> bool:
    return 2 * sum(number == 1 for number in counts.values()) > sum(counts.values())


def _labels_of(
    train: Iterator[Row], evaluation: Callable[[], Iterator[Row]] | None, kind: TargetKind
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The labels, or none where the targets are text, and what to say about that."""
    counts = _count_targets(train)
    if kind == "auto":
        seen = _count_targets(evaluation()) if evaluation else None
        # Who allows empty targets has text: a label needs a name.
        kind = "labels" if "" not in counts and are_labels(counts, seen) else "text"
        if kind == "text":
            rows = sum(counts.values())
            return (), (
                f"targets: {len(counts):,} distinct in {rows:,} rows: text to generate; "
                "data.targets=labels would rank them as labels",
            )
    if "" in counts:
        raise UserError(
            f"{counts['']} targets are empty, and a label needs a name; fill them in, for instance "
            "with none, or set data.targets=text"
        )
    return tuple(sorted(counts)), ()


def _count_targets(rows: Iterator[Row]) -> Counter[str]:
    return Counter(row["targets"] for row in rows)  # reads on to the end: every line is checked


def _template(template: str, column: str, field: str) -> TextTemplate:
    return parse_template(template, field=field) if template else column_template(column)


def _examples(
    file: RowFile,
    *,
    inputs: TextTemplate,
    targets: TextTemplate,
    labels: tuple[str, ...],
    allow_empty: bool,
) -> Iterator[Row]:
    empty = True
    for where, row in file.rows():
        if empty:
            empty = False
            _require_columns(file, row, where, inputs=inputs, targets=targets)
        texts: dict[str, str] = {}
        for side, template in (("inputs", inputs), ("targets", targets)):
            for column in template.columns:
                if column not in row:
                    raise UserError(f"{where}: {_no_column(column, row, side)}")
                texts[column] = value_text(row[column], column, where)
        target = targets.render(texts).strip()
        if not target and not allow_empty:
            raise UserError(
                f"{where}: the target is empty; fill it in or remove the line (where nothing is an "
                "answer, set data.allow_empty_targets=True)"
            )
        if labels and target not in labels:
            raise UserError(
                f"{where}: the target {target!r} is none of the labels: {suggest(target, labels)}"
            )
        others = {
            column: value if isinstance(value, list | dict) else value_text(value, column, where)
            for column, value in row.items()
        }
        yield {**others, "inputs": inputs.render(texts), "targets": target}
    if empty:
        raise UserError(f"{file.path}: holds no examples")


def _require_columns(
    file: RowFile, row: Row, where: str, *, inputs: TextTemplate, targets: TextTemplate
) -> None:
    # A table's columns are named in its first line.
    where = f"{file.path}:1" if file.is_table else where
    for side, template in (("inputs", inputs), ("targets", targets)):
        for column in template.columns:
            if column in row:
                continue
            message = f"{where}: {_no_column(column, row, side)}"
            if file.is_table and file.header and not file.columns:
                message += f"; if the first line is an example, {_naming(row, inputs, targets)}"
            raise UserError(message)


def _naming(row: Row, inputs: TextTemplate, targets: TextTemplate) -> str:
    """How to name the columns of a table without a header."""
    asked = list(dict.fromkeys([*inputs.columns, *targets.columns]))
    if len(asked) == len(row) == 2:
        return (
            f"set data.columns={','.join(asked)} or data.columns={','.join(reversed(asked))}, "
            "as they stand in the file"
        )
    return (
        f"name the {len(row)} columns as they stand in the file with data.columns, "
        f"{', '.join(asked)} among them"
    )


def _no_column(column: str, values: Row, side: str) -> str:
    names = [name if len(name) <= 40 else f"{name[:37]}..." for name in values]
    return (
        f"no column {column!r}: {suggest(column, names)}; say which one with "
        f"--set data.{side}_column=NAME, or several with data.{side}_template"
    )


def _fingerprint(file: RowFile, sides: tuple[TextTemplate, TextTemplate]) -> str:
    digest = hashlib.sha256(repr(sides).encode())
    digest.update(file.fingerprint().encode())
    return digest.hexdigest()
