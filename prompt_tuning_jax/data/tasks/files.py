"""Tasks of a user's files."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal, TypeAlias

from prompt_tuning_jax.config.text_template import TextTemplate, column_template, parse_template
from prompt_tuning_jax.data.tasks.metrics import get_metric
from prompt_tuning_jax.data.tasks.row_files import RowFile, value_text
from prompt_tuning_jax.data.tasks.task import Row, Source, Task
from prompt_tuning_jax.errors import UserError, suggest
from prompt_tuning_jax.storage import expanded

# With more distinct targets in the training file, targets are text and not labels.
MAX_LABELS = 50
# In so few rows all labels may differ; longer targets (in words) are text.
_FEW_ROWS = 4
_SHORT_WORDS = 3

# The prefix of the names of these tasks.
FILE_TASK = "file:"

# The version of all tasks of files: change it when the same rows become other examples.
_VERSION = "1"

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
    """Makes a task of one or two files; the arguments are the fields of ``experiment.Data``.

    ``RowFile`` reads the files.  Values become text: JSON numbers as they are spelled, booleans
    ``True`` and ``False``, null an empty string.  White space around a target is stripped.  Each
    example keeps all columns of its row, of any type; columns that a template names must be text,
    numbers or booleans.

    With ``labels``, every target must be one of them.  Otherwise ``targets`` decides whether the
    targets of the training file are labels, in alphabetical order, or text; ``auto`` decides by
    their number and repetition (``are_labels``), and the task's ``notes`` report the decision.
    Without a training file there are no labels, since an evaluation file may lack some.  The
    default of ``metrics`` is accuracy.

    Raises UserError that names file and line, now or when rows are read, for a file that is
    missing, empty, malformed, of an unknown format or not text, for a missing column, and for an
    empty target.
    """
    files = _row_files(
        train, eval, train_split, eval_split, header=header, columns=columns, separator=separator
    )
    sides = _sides(inputs_column, targets_column, inputs_template, targets_template)
    required = tuple(labels)
    read = partial(
        _examples,
        inputs=sides[0],
        targets=sides[1],
        labels=required,
        allow_empty=allow_empty_targets,
    )

    def fingerprint(split: str, data_dir: str) -> str:
        # Includes what is refused, because cached examples are not checked again.
        parts = (sides, required, allow_empty_targets, files[split].fingerprint())
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    notes: tuple[str, ...] = ()
    if not labels and train and targets != "text":
        evaluation = files.get(eval_split)
        # For predictions the file need not exist.
        exists = evaluation is not None and evaluation.path.exists()
        labels, notes = _labels_of(
            read(files[train_split]),
            (lambda: read(files[eval_split])) if exists else None,
            targets,
        )
    return Task(
        name=FILE_TASK + next(iter(files.values())).path.name,
        source=Source(
            splits=tuple(files),
            rows=lambda split, data_dir: read(files[split]),
            fingerprint=fingerprint,
            display_names={split: file.title for split, file in files.items()},
        ),
        labels=tuple(labels),
        metrics=tuple(get_metric(name, labels=labels) for name in metrics or ("accuracy",)),
        inputs_ending=sides[0].literals[-1],
        description=", ".join(f"{split}: {file.path}" for split, file in files.items()),
        notes=notes
        + tuple(n for file in files.values() if file.path.exists() for n in file.notes()),
        version=_VERSION,
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
    """Raises UserError unless each file exists and has a row with the required columns."""
    files = _row_files(
        train, eval, train_split, eval_split, header=header, columns=columns, separator=separator
    )
    inputs, targets = _sides(inputs_column, targets_column, inputs_template, targets_template)
    for file in files.values():  # all of them, before any is read
        if not file.path.exists():
            raise UserError(f"{file.path}: no such file")
    for file in files.values():
        where, row = next(file.rows(), ("", None))
        if row is None:
            raise UserError(f"{file.path}: no examples")
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
    """Returns the files by split."""
    if train and eval and train_split == eval_split:
        raise UserError(
            f"data.train_split and data.eval_split are both {train_split!r}; rename one"
        )
    files = {
        split: RowFile(
            path=expanded(path),
            split=split,
            header=header,
            columns=tuple(columns),
            separator=separator,
        )
        for split, path in ((train_split, train), (eval_split, eval))
        if path
    }
    if not files:
        raise UserError("no files: set data.train or data.eval")
    if (not header or columns or separator) and not any(f.is_table for f in files.values()):
        raise UserError(
            "data.header, data.columns and data.separator are for .csv and .tsv files, not for "
            f"{next(iter(files.values())).title}"
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
    """Returns whether targets are labels (rather than text), by how often each occurs.

    They are text if there are more than ``MAX_LABELS``; if most rows have a unique target; if there
    are more than ten and they are long; and if most rows of the evaluation file have a unique
    target that the training file lacks.  In a file of few rows, targets of up to three words are
    labels, and so are targets that the evaluation file repeats.
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
    """Returns the labels (empty if the targets are text), and notes about the decision."""
    counts = _count_targets(train)
    if kind == "auto":
        seen = _count_targets(evaluation()) if evaluation else None
        # Empty targets mean text, since a label needs a name.
        kind = "labels" if "" not in counts and are_labels(counts, seen) else "text"
        if kind == "text":
            rows = sum(counts.values())
            return (), (
                f"targets: {len(counts):,} distinct in {rows:,} rows: text to generate; "
                "set data.targets=labels to rank them as labels",
            )
    if "" in counts:
        raise UserError(
            f"{counts['']} targets are empty, but a label needs a name; fill them in (for instance "
            "with none), or set data.targets=text"
        )
    return tuple(sorted(counts)), ()


def _count_targets(rows: Iterator[Row]) -> Counter[str]:
    return Counter(row["targets"] for row in rows)  # reads, and so checks, every line


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
                f"{where}: the target is empty; fill it in or remove the line (if empty answers "
                "are valid, set data.allow_empty_targets=True)"
            )
        if labels and target not in labels:
            raise UserError(
                f"{where}: the target {target!r} is not one of the labels: "
                f"{suggest(target, labels)}"
            )
        others = {
            column: value if isinstance(value, list | dict) else value_text(value, column, where)
            for column, value in row.items()
        }
        yield {**others, "inputs": inputs.render(texts), "targets": target}
    if empty:
        raise UserError(f"{file.path}: no examples")


def _require_columns(
    file: RowFile, row: Row, where: str, *, inputs: TextTemplate, targets: TextTemplate
) -> None:
    # The first line of a table names its columns.
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
    """Returns how to name the columns of a table without a header."""
    columns = list(dict.fromkeys([*inputs.columns, *targets.columns]))
    if len(columns) == len(row) == 2:
        return (
            f"set data.columns={','.join(columns)} or data.columns={','.join(reversed(columns))}, "
            "in the order of the file"
        )
    return (
        f"name all {len(row)} columns in the order of the file with data.columns, including "
        f"{', '.join(columns)}"
    )


def _no_column(column: str, values: Row, side: str) -> str:
    names = [name if len(name) <= 40 else f"{name[:37]}..." for name in values]
    return (
        f"no column {column!r}: {suggest(column, names)}; choose one with "
        f"--set data.{side}_column=NAME, or several with data.{side}_template"
    )
