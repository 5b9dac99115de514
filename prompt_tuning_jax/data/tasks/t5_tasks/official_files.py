"""Rows in the shape of TensorFlow Datasets from a folder of the data sets' official files.

A data set is looked for in ``data_dir`` itself, in a folder of the collection's name in it
(``super_glue``, ``glue``, ``squad``, ``mrqa``, ...), and ``data_dir`` may be a task's own folder.
Names of folders are compared without regard to case, ``-`` and ``_``:

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

Any file may end in .gz.  Where a SuperGLUE file is missing, ``train_part.jsonl`` and the like take
its place, with a warning: scores on them are not those of the official split.
"""

import functools
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path

from prompt_tuning_jax.data.tasks.code_identity import code_identity
from prompt_tuning_jax.data.tasks.t5_tasks.official_layout import COLLECTIONS, Choice, layout
from prompt_tuning_jax.data.tasks.task import Row
from prompt_tuning_jax.errors import UserError, suggest

_log = logging.getLogger(__name__)


def known_datasets() -> tuple[str, ...]:
    """The names of the data sets that can be read from files, as TFDS writes them."""
    return tuple(layout())


def official_splits(dataset: str) -> tuple[str, ...]:
    """The splits that the files of a data set make, under TFDS's names."""
    return tuple(layout().get(dataset, {}))


def official_rows(dataset: str, split: str, data_dir: str) -> Iterator[Row]:
    """Yield the rows of a split in the order of its file.

    Args:
      dataset: TFDS's name without version: ``super_glue/rte``, ``squad/v1.1``, ``xsum``.
      split: TFDS's name, for instance ``validation`` (``test`` for MRQA's out-of-domain sets).
      data_dir: a folder, see above.

    Raises UserError where there is no such file (naming what was looked for), and for a line that
    is cut off, lacks a field or has an unknown label (naming file and line).
    """
    choice, paths = _locate(dataset, split, data_dir)
    if choice.partial:
        _warn_once(str(paths[0]))
    yield from choice.read(paths)


def official_fingerprint(dataset: str, split: str, data_dir: str) -> str:
    """A string that changes when the files of the split do."""
    choice, paths = _locate(dataset, split, data_dir)
    # The readers' own code counts: what they make of a file is cached under this.
    digest = hashlib.sha256(f"{dataset} {code_identity(choice.read)}".encode())
    for path in paths:
        try:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    return digest.hexdigest()


def official_remark(dataset: str, split: str, data_dir: str) -> str:
    """That the files hold a part of the official split, where they do; else empty."""
    choice, paths = _locate(dataset, split, data_dir)
    if not choice.partial:
        return ""
    return f"NOT the official split but what of it is in {paths[0].name}"


def has_official_files(dataset: str, split: str, data_dir: str) -> bool:
    """Whether the files of a split are there."""
    return _find(dataset, split, data_dir) is not None


def looked_for(dataset: str, split: str) -> str:
    """The files that would do, for messages."""
    names = [" with ".join(choice.files) for choice in _choices(dataset, split)]
    return f"{' or '.join(names)} (each also with .gz)"


def _locate(dataset: str, split: str, data_dir: str) -> tuple[Choice, list[Path]]:
    found = _find(dataset, split, data_dir)
    if found is None:
        raise UserError(
            f"{data_dir} holds no file of {dataset}, split {split!r}; looked for "
            f"{looked_for(dataset, split)}"
        )
    return found


def _choices(dataset: str, split: str) -> tuple[Choice, ...]:
    if dataset not in layout():
        raise UserError(f"no files are known for {dataset!r}: {suggest(dataset, layout())}")
    splits = layout()[dataset]
    if split not in splits:
        raise UserError(f"{dataset} has no split {split!r}: {suggest(split, splits)}")
    return splits[split]


def _find(dataset: str, split: str, data_dir: str) -> tuple[Choice, list[Path]] | None:
    choices = _choices(dataset, split)
    own = Path(data_dir)
    inside = [_child(own, name) for name in COLLECTIONS[dataset.partition("/")[0]]]
    for choice in choices:
        for folder in (own, *(folder for folder in inside if folder)):
            paths = [_resolve(folder, file) for file in choice.files]
            if all(paths):
                return choice, [path for path in paths if path]
        # data_dir may be the task's own folder.
        parts = [file.split("/", 1) for file in choice.files]
        if all(len(p) > 1 and _plain(p[0]) == _plain(own.absolute().name) for p in parts):
            paths = [_resolve(own, p[1]) for p in parts]
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
