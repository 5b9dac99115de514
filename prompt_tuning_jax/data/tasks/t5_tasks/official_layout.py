"""Which official files hold which split of which data set; ``official_files`` says it in words."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prompt_tuning_jax.data.tasks.t5_tasks.official_glue import glue_rows, mrpc_rows
from prompt_tuning_jax.data.tasks.t5_tasks.official_qa import (
    dpr_rows,
    mrqa_rows,
    squad_rows,
    summary_rows,
)
from prompt_tuning_jax.data.tasks.t5_tasks.official_super_glue import super_glue_rows
from prompt_tuning_jax.data.tasks.task import Row

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
# The folders, beside data_dir itself, that a collection may be in.
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
    """Files (relative to the collection's folder) that together hold a split, and their reader."""

    files: tuple[str, ...]
    read: Callable[[Sequence[Path]], Iterator[Row]]
    partial: bool = False  # not all of the official split


@functools.cache
def layout() -> Mapping[str, Mapping[str, tuple[Choice, ...]]]:
    """Data set -> split -> the files that may hold it, the best first."""
    found: dict[str, dict[str, tuple[Choice, ...]]] = {}
    for config, folder in SUPER_GLUE_FOLDERS.items():
        found[f"super_glue/{config}"] = _super_glue(config, folder)
    for config, folder in _GLUE.items():
        found[f"glue/{config}"] = {
            split: (_glue(config, split, f"{folder}/{name}.tsv"),)
            for split, name in (("train", "train"), ("validation", "dev"), ("test", "test"))
        }
    found["glue/mrpc"] = _mrpc(found["glue/mrpc"])
    found["glue/ax"] = {
        "test": tuple(
            _glue("ax", "test", file)
            for file in ("diagnostic/diagnostic.tsv", "AX/AX.tsv", "AX/test.tsv", "AX.tsv")
        )
    }
    found |= _mnli()
    found["squad/v1.1"] = {
        "train": (_one("train-v1.1.json", squad_rows),),
        "validation": (_one("dev-v1.1.json", squad_rows),),
    }
    found |= _mrqa()
    found["definite_pronoun_resolution"] = {
        split: (_one(f"{split}.c.txt", dpr_rows),) for split in ("train", "test")
    }
    found["xsum"] = _summaries("xsum", {"document": True, "summary": True})
    found["cnn_dailymail"] = _summaries(
        "cnn_dailymail", {"article": True, "highlights": True, "id": False}
    )
    return found


def _one(file: str, read: Callable[[Path], Iterator[Row]]) -> Choice:
    return Choice(files=(file,), read=lambda paths: read(paths[0]))


def _super_glue(config: str, folder: str) -> dict[str, tuple[Choice, ...]]:
    if config in ("axb", "axg"):
        read = functools.partial(super_glue_rows, config, labelled=False)
        return {"test": (_one(f"{folder}/{folder}.jsonl", read),)}

    def choices(split: str, name: str) -> tuple[Choice, ...]:
        read = functools.partial(super_glue_rows, config, labelled=split != "test")
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
    found: dict[str, dict[str, tuple[Choice, ...]]] = {
        "glue/mnli": {"train": (_glue("mnli", "train", "MNLI/train.tsv"),)}
    }
    for split, name in (("validation", "dev"), ("test", "test")):
        for which in ("matched", "mismatched"):
            choice = (_glue("mnli", split, f"MNLI/{name}_{which}.tsv"),)
            found["glue/mnli"][f"{split}_{which}"] = choice
            found.setdefault(f"glue/mnli_{which}", {})[split] = choice
    return found


def _mrqa() -> dict[str, dict[str, tuple[Choice, ...]]]:
    def choices(folder: str, name: str) -> tuple[Choice, ...]:
        # BioASQ's comes from elsewhere, and people put all of them into one folder.
        files = [f"{folder}/{name}.jsonl", f"out_of_domain/{name}.jsonl"]
        if name in _MRQA_TEST.values():
            files.append(f"{name}.jsonl")
        return tuple(_one(file, mrqa_rows) for file in files)

    found: dict[str, dict[str, tuple[Choice, ...]]] = {}
    for config, name in _MRQA_BOTH.items():
        found[f"mrqa/{config}"] = {
            "train": choices("train", name),
            "validation": choices("dev", name),
        }
    for config, name in _MRQA_TEST.items():
        found[f"mrqa/{config}"] = {"test": choices("dev", name)}
    return found


def _summaries(folder: str, fields: Mapping[str, bool]) -> dict[str, tuple[Choice, ...]]:
    read = functools.partial(summary_rows, fields=fields)
    names = {"train": ("train",), "validation": ("validation", "val", "dev"), "test": ("test",)}
    return {
        split: tuple(_one(f"{folder}/{name}.jsonl", read) for name in options)
        for split, options in names.items()
    }
