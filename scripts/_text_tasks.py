"""The tasks of the comparison scripts: the bundled one, and small labeled text datasets."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from prompt_tuning_jax.config.experiment import Data
from prompt_tuning_jax.errors import UserError

Rows = dict[str, list[dict[str, str]]]


@dataclass(frozen=True, kw_only=True)
class TextTask:
    """The data for training and selection (``validation``), and for the result (``test``)."""

    name: str
    validation: Data
    test: Data


def text_tasks(
    folder: str | None, *, cache: Path, only: Sequence[str] = (), superglue: str | None = None
) -> dict[str, TextTask]:
    """Returns the tasks named in ``only``, or all: the bundled one, and those of the folders.

    The datasets are read from their original files and written to ``cache`` as jsonl files.
    ``superglue`` is a folder with the official files of RTE, CB and BoolQ.
    """
    sources = {name: (read, folder) for name, read in READERS.items() if folder}
    sources |= {name: (read, superglue) for name, read in SUPERGLUE.items() if superglue}
    names = ["word_valence", *sources]
    unknown = [name for name in only if name not in names]
    if unknown:
        raise UserError(f"unknown task {unknown[0]!r}; choose from {', '.join(names)}")
    tasks = {}
    for name in only or names:
        if name == "word_valence":
            data = Data(task=name, inputs_length=14, targets_length=4, max_eval_examples=500)
            test = dataclasses.replace(data, eval_split="test", max_eval_examples=0)
        else:
            read, source = sources[name]
            files = write_splits(read(Path(str(source))), cache / name)
            data = Data(
                train=str(files["train"]),
                eval=str(files["validation"]),
                inputs_length=LENGTHS[name],
                targets_length=4,
                max_eval_examples=500,
            )
            test = dataclasses.replace(data, eval=str(files["test"]), max_eval_examples=0)
        tasks[name] = TextTask(name=name, validation=data, test=test)
    return tasks


def subjectivity(folder: Path) -> Rows:
    """Pang & Lee 2004, split 80/10/10 by a hash of the sentence."""
    files = {"opinion": "quote.tok.gt9.5000", "story": "plot.tok.gt9.5000"}
    rows: Rows = {"train": [], "validation": [], "test": []}
    for label, file in files.items():
        for line in read_lines(folder / "subjectivity" / file):
            rows[split_of(line)].append({"inputs": line, "targets": label})
    return rows


def sentence_polarity(folder: Path) -> Rows:
    """Pang & Lee 2005, split 80/10/10 by a hash of the sentence."""
    files = {"terrible": "rt-polarity.neg", "beautiful": "rt-polarity.pos"}
    rows: Rows = {"train": [], "validation": [], "test": []}
    for label, file in files.items():
        for line in read_lines(folder / "sentence_polarity" / file):
            rows[split_of(line)].append({"inputs": line, "targets": label})
    return rows


def qc(folder: Path) -> Rows:
    """Li & Roth 2002, coarse labels; a hash selects a tenth of the training file for validation."""
    labels = {
        "ABBR": "letter",
        "DESC": "reason",
        "ENTY": "thing",
        "HUM": "person",
        "LOC": "place",
        "NUM": "number",
    }
    rows: Rows = {"train": [], "validation": [], "test": []}
    for file, test in ((find(folder / "qc", "train"), False), (find(folder / "qc", "test"), True)):
        for line in read_lines(file):
            kind, _, question = line.partition(" ")
            split = "test" if test else "train" if split_of(question) != "test" else "validation"
            coarse = labels[kind.partition(":")[0]]
            rows[split].append({"inputs": question, "targets": coarse})
    return rows


def qc_number(folder: Path) -> Rows:
    """The questions of ``qc`` about numbers: how many, in which year, or another quantity."""
    labels = {"count": "many", "date": "year"}
    rows: Rows = {"train": [], "validation": [], "test": []}
    for file, test in ((find(folder / "qc", "train"), False), (find(folder / "qc", "test"), True)):
        for line in read_lines(file):
            kind, _, question = line.partition(" ")
            coarse, _, fine = kind.partition(":")
            if coarse == "NUM":
                split = "train" if split_of(question) != "test" else "validation"
                target = labels.get(fine, "much")
                rows["test" if test else split].append({"inputs": question, "targets": target})
    return rows


def rte(folder: Path) -> Rows:
    """Recognizing textual entailment; half of the official validation examples are the test."""
    labels = {"entailment": "true", "not_entailment": "false"}
    return halves(folder / "RTE", "{premise} Claim: {hypothesis}", labels, train="train")


def cb(folder: Path) -> Rows:
    """CommitmentBank; half of the official validation examples are the test."""
    labels = {"entailment": "true", "contradiction": "false", "neutral": "unknown"}
    return halves(folder / "CB", "{premise} Claim: {hypothesis}", labels, train="train")


def boolq(folder: Path) -> Rows:
    """BoolQ from its validation examples alone: 40 % train, 10 % select, and half are the test."""
    labels = {"True": "yes", "False": "no"}
    rows = halves(folder / "BoolQ", "Question: {question} {passage}", labels, train=None)
    kept = len(rows["validation"]) // 5
    rows["train"], rows["validation"] = rows["validation"][kept:], rows["validation"][:kept]
    return rows


def halves(folder: Path, template: str, labels: dict[str, str], *, train: str | None) -> Rows:
    """Reads a task, and divides its official validation examples by a hash of the text."""
    rows: Rows = {"train": [], "validation": [], "test": []}
    for file in ("val", *([train] if train else ())):
        for line in read_lines(folder / f"{file}.jsonl", encoding="utf-8"):
            fields = json.loads(line)
            text = template.format_map(fields)
            half = "test" if hashlib.sha256(text.encode()).digest()[0] % 2 else "validation"
            split = "train" if file == train else half
            rows[split].append({"inputs": text, "targets": labels[str(fields["label"])]})
    return rows


def read_lines(file: Path, encoding: str = "latin-1") -> list[str]:
    """Returns the non-blank lines of a file."""
    try:
        text = file.read_text(encoding=encoding)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    return [line.strip() for line in text.split("\n") if line.strip()]


def find(folder: Path, word: str) -> Path:
    """Returns the only file in the folder with this word in its name."""
    found = [file for file in sorted(folder.glob("*")) if word in file.name]
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise UserError(f"{folder} must have one file with {word!r} in its name; it has {names}")
    return found[0]


def split_of(text: str) -> str:
    """Returns train, validation or test by hash, for 80, 10 and 10 % of all texts."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 10
    return {8: "validation", 9: "test"}.get(bucket, "train")


def write_splits(rows: Rows, folder: Path) -> dict[str, Path]:
    """Writes a jsonl file per split; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for split, examples in rows.items():
        files[split] = folder / f"{split}.jsonl"
        text = "".join(json.dumps(example) + "\n" for example in examples)
        files[split].write_text(text, encoding="utf-8")
    return files


READERS: dict[str, Callable[[Path], Rows]] = {
    "subjectivity": subjectivity,
    "qc": qc,
    "sentence_polarity": sentence_polarity,
}
SUPERGLUE: dict[str, Callable[[Path], Rows]] = {"rte": rte, "cb": cb, "boolq": boolq}
# Tokens of the input; what is longer is cut.
LENGTHS = {
    "subjectivity": 40,
    "qc": 20,
    "sentence_polarity": 40,
    "rte": 96,
    "cb": 96,
    "boolq": 160,
}
