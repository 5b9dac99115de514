"""Formats scores and predictions: tables for the terminal; JSON, CSV and TSV for files."""

import csv
import io
import re
import sys
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from prompt_tuning_jax.errors import printable
from prompt_tuning_jax.inference.prediction import Prediction
from prompt_tuning_jax.untrusted_input import json_text

_BREAKS = re.compile(r"[\t\r\n]+")
_UNBOUNDED = 10_000  # columns, so that a table is as wide as it needs to be


class Scores(Protocol):
    """The result of an evaluation: ``{metric: value}`` for each prompt and over all prompts."""

    @property
    def names(self) -> Sequence[str]: ...
    @property
    def per_prompt(self) -> Sequence[Mapping[str, float]]: ...
    @property
    def mean(self) -> Mapping[str, float]: ...
    @property
    def best(self) -> Mapping[str, float]: ...
    @property
    def ensemble(self) -> Mapping[str, float] | None: ...
    @property
    def split(self) -> str: ...
    @property
    def title(self) -> str: ...


def scores_as_dict(scores: Scores) -> dict[str, Any]:
    """Returns the scores as a JSON-compatible dictionary."""
    return {
        "split": scores.split,
        "data": scores.title,
        "per_prompt": [
            {"prompt": name, **values}
            for name, values in zip(scores.names, scores.per_prompt, strict=True)
        ],
        "mean": dict(scores.mean),
        "best": dict(scores.best),
        "ensemble": None if scores.ensemble is None else dict(scores.ensemble),
    }


def short_names(names: Sequence[str]) -> list[str]:
    """Returns the paths without the leading folders that all of them share."""
    parts = [name.split("/") for name in names]
    common = 0
    while all(len(path) > common + 1 and path[common] == parts[0][common] for path in parts):
        common += 1
    return ["/".join(path[common:]) for path in parts]


def print_scores(scores: Scores) -> None:
    """Prints a table with one row per prompt, then the mean, the best and the ensemble's vote.

    If stdout is not a terminal, the table is not truncated.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    metrics = list(dict.fromkeys(name for each in scores.per_prompt for name in each))
    # A name may contain brackets, which rich would parse as markup.
    table = Table()
    table.add_column(Text(printable(scores.title)), overflow="fold")
    for metric in metrics:
        table.add_column(Text(printable(metric)), justify="right", no_wrap=True)

    def add_row(name: str, values: Mapping[str, float]) -> None:
        cells = [f"{values[metric]:.2f}" if metric in values else "-" for metric in metrics]
        table.add_row(Text(printable(name)), *cells)

    for name, values in zip(short_names(scores.names), scores.per_prompt, strict=True):
        add_row(name, values)
    if len(scores.per_prompt) > 1:
        table.add_section()
        for name in ("mean", "best", "ensemble"):
            if values := getattr(scores, name):
                add_row(name, values)
    Console(width=None if sys.stdout.isatty() else _UNBOUNDED).print(table)


Form: TypeAlias = Literal["jsonl", "json", "csv", "tsv"]
_FORMS: Mapping[str, Form] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
}


def form_of(path: str) -> Form | None:
    """Returns the format for a file name's suffix, or None if the suffix is unknown."""
    return _FORMS.get(Path(path).suffix.lower())


def predictions_text(given: Sequence[str], predictions: Sequence[Prediction], form: Form) -> str:
    """Formats the results of ``predict``, with one record per input.

    CSV and TSV keep the columns of a data file's rows.  ``given`` are the user's texts, and empty
    for the rows of a file.
    """
    records = []
    columns = {name for prediction in predictions for name in prediction.row or ("input",)}
    for number, prediction in enumerate(predictions):
        text = given[number] if given else prediction.input
        record: dict[str, Any] = {"input": text, "prediction": prediction.prediction}
        if form in ("csv", "tsv"):
            record = {"input": text} if prediction.row is None else dict(prediction.row)
            record[_free("prediction", columns)] = prediction.prediction
            record[_free("log_prob", columns)] = (prediction.log_probs or {}).get(
                prediction.prediction
            )
        else:
            others = {
                "log_probs": prediction.log_probs,
                "votes": prediction.votes,
                "truncated": prediction.truncated or None,
                "row": prediction.row,
            }
            record |= {name: value for name, value in others.items() if value is not None}
        records.append(record)
    return records_text(records, form)


def evaluated_text(rows: Sequence[Mapping[str, Any]], form: Form) -> str:
    """Formats the rows of ``evaluation.prediction_rows``.

    CSV and TSV have a column for each of several prompts, followed by the other columns of a user's
    file.
    """
    if form in ("jsonl", "json"):
        return records_text(rows, form)
    records = []
    for row in rows:
        record = {name: row[name] for name in ("task", "input", "target") if name in row}
        record |= {"prediction": row["prediction"], "correct": row["correct"]}
        record["log_prob"] = row["log_probs"].get(row["prediction"])
        if len(row["prompts"]) > 1:
            names = short_names([one["prompt"] for one in row["prompts"]])
            for name, one in zip(names, row["prompts"], strict=True):
                record[_free(name, record)] = one["prediction"]
        for name, value in row.get("row", {}).items():
            record[_free(name, record)] = value
        records.append(record)
    return records_text(records, form)


def records_text(records: Sequence[Mapping[str, Any]], form: Form) -> str:
    """Returns the records as the text of a file."""
    if form == "jsonl":
        return "".join(f"{json_text(record)}\n" for record in records)
    if form == "json":
        return "[\n" + ",\n".join(map(json_text, records)) + "\n]\n"
    header = list(dict.fromkeys(name for record in records for name in record))
    table = [header, *([_cell(record.get(name)) for name in header] for record in records)]
    if form == "tsv":  # TSV has no quoting, so tabs and line breaks become spaces
        return "".join("\t".join(_BREAKS.sub(" ", cell) for cell in line) + "\n" for line in table)
    return "".join(map(_csv_line, table))


def _csv_line(cells: Sequence[str]) -> str:
    # With \r\n as the end of lines, the writer quotes cells that have either character.
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerow(cells)
    return text.getvalue().removesuffix("\r\n") + "\n"


def _cell(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json_text(value)


def _free(name: str, taken: Container[str]) -> str:
    """Returns the name, with a number appended if a column already has it."""
    number, free = 2, name
    while free in taken:
        free, number = f"{name}_{number}", number + 1
    return free
