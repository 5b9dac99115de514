"""Reads the data sets' official files as rows of TensorFlow Datasets.

A data set is searched for in ``data_dir`` itself and in its subfolder named after the collection
(``super_glue``, ``glue``, ``squad``, ``mrqa``, ...); ``data_dir`` may also be a task's folder.
Folder names are compared without regard to case, ``-`` and ``_``:

  super_glue  BoolQ/{train,val,test}.jsonl, CB, COPA, MultiRC, RTE, ReCoRD, WSC, WiC,
              AX-b/AX-b.jsonl, AX-g/AX-g.jsonl
  glue        CoLA/{train,dev,test}.tsv, SST-2, QQP, STS-B, QNLI, RTE, WNLI,
              MNLI/{train,dev_matched,dev_mismatched,test_matched,test_mismatched}.tsv,
              MRPC/{msr_paraphrase_train.txt and dev_ids.tsv, msr_paraphrase_test.txt} (positions
              as in TFDS) or MRPC/{train,dev,test}.tsv, diagnostic/diagnostic.tsv (also AX/AX.tsv)
  squad       train-v1.1.json, dev-v1.1.json
  mrqa        {train,dev}/SQuAD.jsonl.gz and so on; without those folders the files themselves
  definite_pronoun_resolution  train.c.txt, test.c.txt
  xsum        xsum/{train,validation,test}.jsonl, objects with ``document`` and ``summary``
  cnn_dailymail  cnn_dailymail/{train,...}.jsonl with ``article`` and ``highlights``

Any file may end in .gz.  If a SuperGLUE file is missing, ``train_part.jsonl`` and the like are used
instead, with a warning, because scores on them are not those of the official split.
"""

import functools
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prompt_tuning_jax.data.tasks.code_digest import code_digest
from prompt_tuning_jax.data.tasks.t5_tasks.official_glue import (
    glue_rows,
    mrpc_rows,
    super_glue_rows,
)
from prompt_tuning_jax.data.tasks.t5_tasks.official_qa import (
    dpr_rows,
    mrqa_rows,
    squad_rows,
    summary_rows,
)
from prompt_tuning_jax.data.tasks.task import Row
from prompt_tuning_jax.errors import UserError, suggest

SUPER_GLUE_FOLDERS = {
    "boolq": "BoolQ",
    "cb": "CB",
    "copa": "COPA",
    "multirc": "MultiRC",
    "record": "ReCoRD",
    "rte": "RTE",
    "wic": "WiC",
    "wsc": "WSC",
    "wsc.fixed": "WSC",
    "axb": "AX-b",
    "axg": "AX-g",
}
_GLUE = {
    "cola": "CoLA",
    "sst2": "SST-2",
    "mrpc": "MRPC",
    "qqp": "QQP",
    "stsb": "STS-B",
    "qnli": "QNLI",
    "rte": "RTE",
    "wnli": "WNLI",
}
_MRQA_BOTH = {
    "squad": "SQuAD",
    "news_qa": "NewsQA",
    "trivia_qa": "TriviaQA-web",
    "search_qa": "SearchQA",
    "hotpot_qa": "HotpotQA",
    "natural_questions": "NaturalQuestionsShort",
}
_MRQA_TEST = {
    "bio_asq": "BioASQ",
    "drop": "DROP",
    "duo_rc": "DuoRC.ParaphraseRC",
    "race": "RACE",
    "relation_extraction": "RelationExtraction",
    "textbook_qa": "TextbookQA",
}
# Folders in ``data_dir`` that may contain a collection.
COLLECTIONS = {
    "super_glue": ("super_glue", "SuperGLUE"),
    "glue": ("glue", "glue_data"),
    "squad": ("squad", "squad_v1.1"),
    "mrqa": ("mrqa",),
    "definite_pronoun_resolution": ("definite_pronoun_resolution", "dpr"),
    "xsum": (),
    "cnn_dailymail": (),
}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The files that form a split, relative to the collection's folder, and their reader."""

    files: tuple[str, ...]
    read: Callable[[Sequence[Path]], Iterator[Row]]
    partial: bool = False  # contains only a part of the official split


@functools.cache
def layout() -> Mapping[str, Mapping[str, tuple[Choice, ...]]]:
    """Returns TFDS's data set -> split -> the possible files, in order of preference."""
    datasets: dict[str, dict[str, tuple[Choice, ...]]] = {}
    for config, folder in SUPER_GLUE_FOLDERS.items():
        datasets[f"super_glue/{config}"] = _super_glue(config, folder)
    for config, folder in _GLUE.items():
        datasets[f"glue/{config}"] = {
            split: (_glue(config, split, f"{folder}/{name}.tsv"),)
            for split, name in (("train", "train"), ("validation", "dev"), ("test", "test"))
        }
    datasets["glue/mrpc"] = _mrpc(datasets["glue/mrpc"])
    datasets["glue/ax"] = {
        "test": tuple(
            _glue("ax", "test", file)
            for file in ("diagnostic/diagnostic.tsv", "AX/AX.tsv", "AX/test.tsv", "AX.tsv")
        )
    }
    datasets |= _mnli()
    datasets["squad/v1.1"] = {
        "train": (_one("train-v1.1.json", squad_rows),),
        "validation": (_one("dev-v1.1.json", squad_rows),),
    }
    datasets |= _mrqa()
    datasets["definite_pronoun_resolution"] = {
        split: (_one(f"{split}.c.txt", dpr_rows),) for split in ("train", "test")
    }
    datasets["xsum"] = _summaries("xsum", {"document": True, "summary": True})
    datasets["cnn_dailymail"] = _summaries(
        "cnn_dailymail", {"article": True, "highlights": True, "id": False}
    )
    return datasets


def _one(file: str, read: Callable[[Path], Iterator[Row]]) -> Choice:
    return Choice(files=(file,), read=lambda paths: read(paths[0]))


def _super_glue(config: str, folder: str) -> dict[str, tuple[Choice, ...]]:
    if config in ("axb", "axg"):
        read = functools.partial(super_glue_rows, config, labeled=False)
        return {"test": (_one(f"{folder}/{folder}.jsonl", read),)}

    def choices(split: str, name: str) -> tuple[Choice, ...]:
        read = functools.partial(super_glue_rows, config, labeled=split != "test")
        whole = _one(f"{folder}/{name}.jsonl", read)
        part = _one(f"{folder}/{name}_part.jsonl", read)
        return whole, Choice(files=part.files, read=part.read, partial=True)

    return {
        "train": choices("train", "train"),
        "validation": choices("validation", "val"),
        "test": choices("test", "test"),
    }


def _glue(config: str, split: str, file: str) -> Choice:
    return _one(file, functools.partial(glue_rows, config, split=split))


def _mrpc(tables: Mapping[str, tuple[Choice, ...]]) -> dict[str, tuple[Choice, ...]]:
    def from_microsoft(split: str) -> Choice:
        files = ("MRPC/msr_paraphrase_train.txt", "MRPC/dev_ids.tsv")
        return Choice(files=files, read=lambda paths: mrpc_rows(paths[0], paths[1], split=split))

    return {
        "train": (from_microsoft("train"), *tables["train"]),
        "validation": (from_microsoft("validation"), *tables["validation"]),
        "test": (_glue("mrpc", "test", "MRPC/msr_paraphrase_test.txt"), *tables["test"]),
    }


def _mnli() -> dict[str, dict[str, tuple[Choice, ...]]]:
    by_dataset: dict[str, dict[str, tuple[Choice, ...]]] = {
        "glue/mnli": {"train": (_glue("mnli", "train", "MNLI/train.tsv"),)}
    }
    for split, name in (("validation", "dev"), ("test", "test")):
        for which in ("matched", "mismatched"):
            choice = (_glue("mnli", split, f"MNLI/{name}_{which}.tsv"),)
            by_dataset["glue/mnli"][f"{split}_{which}"] = choice
            by_dataset.setdefault(f"glue/mnli_{which}", {})[split] = choice
    return by_dataset


def _mrqa() -> dict[str, dict[str, tuple[Choice, ...]]]:
    def choices(folder: str, name: str) -> tuple[Choice, ...]:
        # BioASQ is published separately, and all sets may be in one folder.
        files = [f"{folder}/{name}.jsonl", f"out_of_domain/{name}.jsonl"]
        if name in _MRQA_TEST.values():
            files.append(f"{name}.jsonl")
        return tuple(_one(file, mrqa_rows) for file in files)

    by_dataset: dict[str, dict[str, tuple[Choice, ...]]] = {}
    for config, name in _MRQA_BOTH.items():
        by_dataset[f"mrqa/{config}"] = {
            "train": choices("train", name),
            "validation": choices("dev", name),
        }
    for config, name in _MRQA_TEST.items():
        by_dataset[f"mrqa/{config}"] = {"test": choices("dev", name)}
    return by_dataset


def _summaries(folder: str, fields: Mapping[str, bool]) -> dict[str, tuple[Choice, ...]]:
    read = functools.partial(summary_rows, fields=fields)
    names = {"train": ("train",), "validation": ("validation", "val", "dev"), "test": ("test",)}
    return {
        split: tuple(_one(f"{folder}/{name}.jsonl", read) for name in options)
        for split, options in names.items()
    }


_log = logging.getLogger(__name__)


def official_rows(dataset: str, split: str, data_dir: str) -> Iterator[Row]:
    """Yields the rows of a split in the order of its file.

    Args:
      dataset: TFDS's name without version: ``super_glue/rte``, ``squad/v1.1``, ``xsum``.
      split: TFDS's name, for instance ``validation`` (``test`` for MRQA's out-of-domain sets).
      data_dir: a folder; see the module's description.

    Raises UserError that lists the expected files if none exists, and UserError with file and line
    for a line that is truncated, lacks a field or has an unknown label.
    """
    choice, paths = _locate(dataset, split, data_dir)
    if choice.partial:
        _warn_once(str(paths[0]))
    yield from choice.read(paths)


def official_fingerprint(dataset: str, split: str, data_dir: str) -> str:
    """Returns a string that changes when the files of the split change."""
    choice, paths = _locate(dataset, split, data_dir)
    # Includes the reader's code, because its output is cached under this fingerprint.
    digest = hashlib.sha256(f"{dataset} {code_digest(choice.read)}".encode())
    for path in paths:
        try:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    return digest.hexdigest()


def official_note(dataset: str, split: str, data_dir: str) -> str:
    """Returns a note if the files have only a part of the official split, otherwise ""."""
    choice, paths = _locate(dataset, split, data_dir)
    if not choice.partial:
        return ""
    return f"NOT the official split but the part of it in {paths[0].name}"


def has_official_files(dataset: str, split: str, data_dir: str) -> bool:
    """Returns whether the files of a split exist."""
    return _find(dataset, split, data_dir) is not None


def looked_for(dataset: str, split: str) -> str:
    """Returns the accepted files, for messages."""
    names = [" with ".join(choice.files) for choice in _choices(dataset, split)]
    return f"{' or '.join(names)} (each also with .gz)"


def _locate(dataset: str, split: str, data_dir: str) -> tuple[Choice, list[Path]]:
    located = _find(dataset, split, data_dir)
    if located is None:
        raise UserError(
            f"{data_dir} has no file of {dataset}, split {split!r}; looked for "
            f"{looked_for(dataset, split)}"
        )
    return located


def _choices(dataset: str, split: str) -> tuple[Choice, ...]:
    if dataset not in layout():
        raise UserError(f"unknown data set {dataset!r}: {suggest(dataset, layout())}")
    splits = layout()[dataset]
    if split not in splits:
        raise UserError(f"{dataset} has no split {split!r}: {suggest(split, splits)}")
    return splits[split]


def _find(dataset: str, split: str, data_dir: str) -> tuple[Choice, list[Path]] | None:
    choices = _choices(dataset, split)
    base = Path(data_dir)
    inside = [_child(base, name) for name in COLLECTIONS[dataset.partition("/")[0]]]
    for choice in choices:
        for folder in (base, *(folder for folder in inside if folder)):
            paths = [_resolve(folder, file) for file in choice.files]
            if all(paths):
                return choice, [path for path in paths if path]
        # ``data_dir`` may be the task's folder.
        parts = [file.split("/", 1) for file in choice.files]
        if all(len(p) > 1 and _plain(p[0]) == _plain(base.absolute().name) for p in parts):
            paths = [_resolve(base, p[1]) for p in parts]
            if all(paths):
                return choice, [path for path in paths if path]
    return None


def _resolve(folder: Path, file: str) -> Path | None:
    path: Path | None = folder
    for part in file.split("/")[:-1]:
        path = path and _child(path, part)
    if path is None:
        return None
    name = file.rpartition("/")[2]
    return next((path / n for n in (name, f"{name}.gz") if (path / n).is_file()), None)


def _child(folder: Path, name: str) -> Path | None:
    exact = folder / name
    if exact.is_dir():
        return exact
    if not folder.is_dir():
        return None
    same = (child for child in sorted(folder.iterdir()) if _plain(child.name) == _plain(name))
    return next((child for child in same if child.is_dir()), None)


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


@functools.cache
def _warn_once(path: str) -> None:
    _log.warning(
        "%s stands in for a missing official file: its scores are not those of the official split",
        path,
    )
