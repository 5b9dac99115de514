"""SuperGLUE's official jsonl files as rows of TensorFlow Datasets' ``super_glue`` 1.0.2.

The conversions are those of ``tensorflow_datasets/text/super_glue.py``: one row per answer of
MultiRC and per query of ReCoRD, labels as class numbers (-1: none), ``wsc.fixed`` mends spans.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prompt_tuning_jax.data.tasks.t5_tasks.official_lines import field, json_lines
from prompt_tuning_jax.data.tasks.task import Row
from prompt_tuning_jax.errors import UserError, suggest
from prompt_tuning_jax.untrusted_input import json_type

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


def super_glue_rows(config: str, path: Path, *, labelled: bool) -> Iterator[Row]:
    """Yield the rows of a file in its order; ``config`` is TFDS's (``rte``, ``wsc.fixed``).

    With ``labelled`` (training and validation files) a row without label is an error, as in TFDS;
    otherwise its label is -1.  UserError names file and line.
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
            row["label"] = _label(raw.get("label"), config, where)
            if labelled and row["label"] == NO_LABEL:
                raise UserError(f"{where}: no label; only the rows of a test file may lack one")
            yield row


def _plain(raw: Mapping[str, Any], config: str, where: str) -> dict[str, Any]:
    row: dict[str, Any] = {name: field(raw, name, str, where) for name in _TEXTS[config]}
    if config == "wic":
        row |= {name: field(raw, name, int, where) for name in _WIC_NUMBERS}
    return row


def _label(value: Any, config: str, where: str) -> int:
    """True, "True", 1, "1" -> 1; null and -1 -> -1."""
    if value is None or value == NO_LABEL:
        return NO_LABEL
    names = LABELS[config]
    known = {**{str(i): i for i in range(len(names))}, **{n: i for i, n in enumerate(names)}}
    if config == "copa":  # TFDS's rule is whether the label is true
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
                "label": _label(label, "multirc", where),
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


# Their subjects have other words in between; nothing can be mended.
_SPLIT_SPANS = ("Kamenev and Zinoviev", "Kamenev, Zinoviev, and Stalin")


def _mend_span(row: dict[str, Any], span: str, where: str) -> None:
    """Make the span's text occur in the text: first letter's case, final full stops, newlines."""
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
