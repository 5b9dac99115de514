"""Reads GLUE's and SuperGLUE's official files as rows of TensorFlow Datasets.

The conversions are those of ``tensorflow_datasets/text/glue.py`` (1.0.0 and 2.0.0 alike) and
``super_glue.py`` (1.0.2).

GLUE's tsv files: ``idx`` is the position in the file.  Labels are class numbers (STS-B: a float32),
or -1 if the file has none.  Rows that lack a field are left out (QQP has some).  Quotes are text.

SuperGLUE's jsonl files: each answer of MultiRC and each query of ReCoRD is a row.  Labels are class
numbers, or -1 for none.  ``wsc.fixed`` corrects spans.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prompt_tuning_jax.data.tasks.t5_tasks.official_lines import field, json_lines, table_rows
from prompt_tuning_jax.data.tasks.task import Row
from prompt_tuning_jax.errors import UserError, suggest
from prompt_tuning_jax.untrusted_input import json_type

_log = logging.getLogger(__name__)

_MRPC_COLUMNS = {"sentence1": "#1 String", "sentence2": "#2 String"}


@dataclass(frozen=True, kw_only=True)
class _Table:
    columns: Mapping[str, str]  # feature -> column
    label: str  # the column of the label
    labels: tuple[str, ...]  # empty if the label is a number
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
    """Yields the rows of a tsv file in its order; UserError names file and line.

    As in TFDS, rows that lack a required field are left out, and the log gives their number.
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
        # MRPC's test file has labels, but TFDS removes them.
        hidden = table.label not in header or (config == "mrpc" and split == "test")
        text = "-1" if hidden else named.get(table.label)
        # An empty class label counts as missing (TFDS leaves the row out); in STS-B it is an error.
        if len(row) < len(table.columns) or text is None or (table.labels and not text):
            left_out += 1
            continue
        row["idx"] = idx
        row["label"] = _label_value(text, table.labels, where)
        yield row
    if left_out:
        _log.warning("%s: left out %d rows that lack a field, as TFDS does", path, left_out)


def mrpc_rows(train: Path, dev_ids: Path, *, split: str) -> Iterator[Row]:
    """Yields MRPC's training and validation rows.

    They come from Microsoft's training file and GLUE's ``dev_ids``.
    """
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


def _label_value(text: str, labels: tuple[str, ...], where: str) -> int | float:
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


NO_LABEL = -1

_FALSE_TRUE = ("False", "True")
_TEXTS: Mapping[str, tuple[str, ...]] = {
    "boolq": ("question", "passage"),
    "cb": ("premise", "hypothesis"),
    "copa": ("choice1", "choice2", "premise", "question"),
    "rte": ("premise", "hypothesis"),
    "wic": ("word", "sentence1", "sentence2"),
    "axb": ("sentence1", "sentence2"),
    "axg": ("premise", "hypothesis"),
}
_WIC_NUMBERS = ("start1", "start2", "end1", "end2")
_ENTAILMENT = ("entailment", "not_entailment")
LABELS: Mapping[str, tuple[str, ...]] = {
    "boolq": _FALSE_TRUE,
    "cb": ("entailment", "contradiction", "neutral"),
    "copa": ("choice1", "choice2"),
    "multirc": _FALSE_TRUE,
    "rte": _ENTAILMENT,
    "wic": _FALSE_TRUE,
    "wsc": _FALSE_TRUE,
    "wsc.fixed": _FALSE_TRUE,
    "axb": _ENTAILMENT,
    "axg": _ENTAILMENT,
}


def super_glue_rows(config: str, path: Path, *, labeled: bool) -> Iterator[Row]:
    """Yields the rows of a file in its order; ``config`` is TFDS's (``rte``, ``wsc.fixed``).

    With ``labeled`` (training and validation files), a row without a label is an error, as in
    TFDS; otherwise its label is -1.  UserError names file and line.
    """
    for number, raw in json_lines(path):
        where = f"{path}:{number}"
        if config == "multirc":
            yield from _multirc(raw, where)
        elif config == "record":
            yield from _record(raw, where)
        else:
            row = (
                _wsc(raw, config, where) if config.startswith("wsc") else _plain(raw, config, where)
            )
            row["idx"] = field(raw, "idx", int, where)
            row["label"] = _class_number(raw.get("label"), config, where)
            if labeled and row["label"] == NO_LABEL:
                raise UserError(f"{where}: no label; only the rows of a test file may lack one")
            yield row


def _plain(raw: Mapping[str, Any], config: str, where: str) -> dict[str, Any]:
    row: dict[str, Any] = {name: field(raw, name, str, where) for name in _TEXTS[config]}
    if config == "wic":
        row |= {name: field(raw, name, int, where) for name in _WIC_NUMBERS}
    return row


def _class_number(value: Any, config: str, where: str) -> int:
    """True, "True", 1, "1" -> 1; null and -1 -> -1."""
    if value is None or value == NO_LABEL:
        return NO_LABEL
    names = LABELS[config]
    known = {**{str(i): i for i in range(len(names))}, **{n: i for i, n in enumerate(names)}}
    if config == "copa":  # in TFDS the class is the truth value of the label
        known |= {"False": 0, "True": 1}
    if isinstance(value, str | int) and str(value) in known:
        return known[str(value)]
    raise UserError(f"{where}: the label is {value!r}: {suggest(str(value), names)}")


def _multirc(raw: Mapping[str, Any], where: str) -> Iterator[Row]:
    paragraph = field(raw, "idx", int, where)
    passage = field(raw, "passage", dict, where)
    text = field(passage, "text", str, where)
    for question in _objects(passage, "questions", where):
        for answer in _objects(question, "answers", where):
            label = answer.get("label")
            yield {
                "paragraph": text,
                "question": field(question, "question", str, where),
                "answer": field(answer, "text", str, where),
                "idx": {
                    "paragraph": paragraph,
                    "question": field(question, "idx", int, where),
                    "answer": field(answer, "idx", int, where),
                },
                "label": _class_number(label, "multirc", where),
            }


def _record(raw: Mapping[str, Any], where: str) -> Iterator[Row]:
    number = field(raw, "idx", int, where)
    passage = field(raw, "passage", dict, where)
    text = field(passage, "text", str, where)
    entities = set()
    for entity in _objects(passage, "entities", where):
        start, end = (field(entity, name, int, where) for name in ("start", "end"))
        entities.add(text[start : end + 1])
    for query in _objects(raw, "qas", where):
        answers = _objects(query, "answers", where) if "answers" in query else []
        yield {
            "passage": text,
            "query": field(query, "query", str, where),
            "entities": sorted(entities),
            "answers": sorted({field(answer, "text", str, where) for answer in answers}),
            "idx": {"passage": number, "query": field(query, "idx", int, where)},
        }


def _objects(row: Mapping[str, Any], name: str, where: str) -> Sequence[Mapping[str, Any]]:
    values: Sequence[Mapping[str, Any]] = field(row, name, list, where)
    for value in values:
        if not isinstance(value, dict):
            raise UserError(f"{where}: {name!r} holds {json_type(value)}, not an object")
    return values


def _wsc(raw: Mapping[str, Any], config: str, where: str) -> dict[str, Any]:
    target = field(raw, "target", dict, where)
    row: dict[str, Any] = {"text": field(raw, "text", str, where)}
    for span in ("span1", "span2"):
        row[f"{span}_index"] = field(target, f"{span}_index", int, where)
        row[f"{span}_text"] = field(target, f"{span}_text", str, where)
    if config == "wsc.fixed":
        for span in ("span1", "span2"):
            _mend_span(row, span, where)
    return row


# The text has other words within these spans, so they cannot be corrected.
_SPLIT_SPANS = ("Kamenev and Zinoviev", "Kamenev, Zinoviev, and Stalin")


def _mend_span(row: dict[str, Any], span: str, where: str) -> None:
    """Edits the span's text so that it occurs in the text.

    Adapts the case of the first letter, drops final full stops and replaces newlines.
    """
    text: str = row[f"{span}_text"]
    if text in row["text"] or text in _SPLIT_SPANS:
        return
    words = row["text"].split()
    index = row[f"{span}_index"]
    if "theyscold" in text:
        row["span2_index"] = 10
    if not -len(words) <= index < len(words):
        raise UserError(f"{where}: {span}_index is {index} and the text has {len(words)} words")
    first = text[0].lower() if words[index][0].islower() else text[0].upper()
    mended = (first + text[1:]).rstrip(".").replace("\n", " ")
    if mended not in row["text"]:
        raise UserError(f"{where}: {span}_text is {text!r}, which does not occur in the text")
    row[f"{span}_text"] = mended
