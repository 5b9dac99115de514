"""GLUE's official tsv files as rows of TensorFlow Datasets' ``glue`` (1.0.0 and 2.0.0 alike).

The conversions are those of ``tensorflow_datasets/text/glue.py``: ``idx`` is the position in the
file, labels are class numbers (STS-B: a float32), -1 where the file has none, rows that lack a
field are left out (QQP has some).  Quotes are text.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prompt_tuning_jax.data.tasks.t5_tasks.official_lines import table_rows
from prompt_tuning_jax.data.tasks.task import Row
from prompt_tuning_jax.errors import UserError, suggest

_log = logging.getLogger(__name__)

_MRPC_COLUMNS = {"sentence1": "#1 String", "sentence2": "#2 String"}


@dataclass(frozen=True, kw_only=True)
class _Table:
    columns: Mapping[str, str]  # feature: column
    label: str  # its column
    labels: tuple[str, ...]  # empty: a number
    # CoLA's training and development files have no header.
    headerless: tuple[str, ...] = ()


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_NLI = ("entailment", "not_entailment")
_MNLI = _Table(
    columns={"premise": "sentence1", "hypothesis": "sentence2"},
    label="gold_label",
    labels=("entailment", "neutral", "contradiction"),
)
_PAIR = _same("sentence1", "sentence2")
_TABLES: Mapping[str, _Table] = {
    "cola": _Table(
        columns=_same("sentence"),
        label="is_acceptable",
        labels=("unacceptable", "acceptable"),
        headerless=("source", "is_acceptable", "star", "sentence"),
    ),
    "sst2": _Table(columns=_same("sentence"), label="label", labels=("negative", "positive")),
    "mrpc": _Table(columns=_MRPC_COLUMNS, label="Quality", labels=("not_equivalent", "equivalent")),
    "qqp": _Table(
        columns=_same("question1", "question2"),
        label="is_duplicate",
        labels=("not_duplicate", "duplicate"),
    ),
    "stsb": _Table(columns=_PAIR, label="score", labels=()),
    "mnli": _MNLI,
    "mnli_matched": _MNLI,
    "mnli_mismatched": _MNLI,
    "qnli": _Table(columns=_same("question", "sentence"), label="label", labels=_NLI),
    "rte": _Table(columns=_PAIR, label="label", labels=_NLI),
    "wnli": _Table(columns=_PAIR, label="label", labels=("not_entailment", "entailment")),
    "ax": _Table(columns=_MNLI.columns, label="", labels=_MNLI.labels),
}


def glue_rows(config: str, path: Path, *, split: str) -> Iterator[Row]:
    """Yield the rows of a tsv file in its order; UserError names file and line.

    A row of fewer fields than the header has is left out where it lacks one that is needed, as in
    TFDS, and the log says how many.
    """
    table = _TABLES[config]
    header = table.headerless if split != "test" else ()
    left_out = 0
    idx = -1
    for line, fields in table_rows(path):
        where = f"{path}:{line}"
        if not header:
            header = tuple(fields)
            _check_header(header, table, where)
            continue
        idx += 1
        named = dict(zip(header, fields, strict=False))
        row: dict[str, object] = {
            feature: named[column] for feature, column in table.columns.items() if column in named
        }
        # MRPC's test file comes with its labels; TFDS hides them.
        hidden = table.label not in header or (config == "mrpc" and split == "test")
        text = "-1" if hidden else named.get(table.label)
        # An empty label of a class is none (TFDS leaves the row out); of STS-B it is an error.
        if len(row) < len(table.columns) or text is None or (table.labels and not text):
            left_out += 1
            continue
        row["idx"] = idx
        row["label"] = _label(text, table.labels, where)
        yield row
    if left_out:
        _log.warning("%s: left out %d rows that lack a field, as TFDS does", path, left_out)


def mrpc_rows(train: Path, dev_ids: Path, *, split: str) -> Iterator[Row]:
    """MRPC's training and validation rows from Microsoft's training file and GLUE's ``dev_ids``."""
    dev = {tuple(fields[:2]) for _, fields in table_rows(dev_ids)}
    ids: dict[int, tuple[str, ...]] = {}
    header: list[str] = []
    for idx, (line, fields) in enumerate(table_rows(train), start=-1):
        if not header:
            header = fields
            for name in ("#1 ID", "#2 ID"):
                if name not in header:
                    raise UserError(f"{train}:{line}: no column {name!r} in the header")
            continue
        named = dict(zip(header, fields, strict=False))
        ids[idx] = (named.get("#1 ID", ""), named.get("#2 ID", ""))
    for row in glue_rows("mrpc", train, split=split):
        if (ids[int(row["idx"])] in dev) == (split == "validation"):
            yield row


def _check_header(header: tuple[str, ...], table: _Table, where: str) -> None:
    for column in table.columns.values():
        if column not in header:
            raise UserError(
                f"{where}: no column {column!r} in the header: {suggest(column, header)}"
            )


def _label(text: str, labels: tuple[str, ...], where: str) -> int | float:
    try:
        if not labels:
            return float(np.float32(text))
        number = labels.index(text) if text in labels else int(text)
        if -1 <= number < len(labels):
            return number
    except ValueError:
        pass
    wanted = suggest(text, labels) if labels else "a number is needed"
    raise UserError(f"{where}: the label is {text!r}: {wanted}")
