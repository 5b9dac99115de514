"""Rows of a data set from wherever ``data_dir`` has them: TensorFlow Datasets or official files."""

import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from prompt_tuning_jax.data.tasks.t5_tasks import official_files, tfds_rows
from prompt_tuning_jax.data.tasks.t5_tasks.t5_task import T5Task
from prompt_tuning_jax.data.tasks.task import Row, Source
from prompt_tuning_jax.errors import UserError

# MRQA's out-of-domain sets have one labelled split, which TFDS calls test and the paper validation.
_OUT_OF_DOMAIN = ("bio_asq", "drop", "duo_rc", "race", "relation_extraction", "textbook_qa")
_SPLITS: Mapping[str, Mapping[str, str]] = {
    f"mrqa/{short}": {"validation": "test"} for short in _OUT_OF_DOMAIN
}


def source_of(task: T5Task) -> Source:
    """The rows of a task, with the names of its own splits.

    ``data_dir`` holds data that TFDS prepared (it may be gs://...) or official files, see
    ``official_files``; empty stands for TFDS's own, $TFDS_DATA_DIR or ~/tensorflow_datasets.
    """
    dataset, _, version = task.tfds.partition(":")
    return Source(
        splits=task.splits,
        rows=partial(_rows, dataset=dataset, version=version),
        fingerprint=partial(_fingerprint, dataset=dataset, version=version),
        note=partial(_remark, dataset=dataset),
    )


def number_of_rows(task: T5Task, split: str, data_dir: str) -> int | None:
    """How many rows a split has, None where ``data_dir`` does not hold it.

    Official files are read for it, and so may raise UserError.
    """
    dataset, _, version = task.tfds.partition(":")
    split = _split_at_source(dataset, split)
    if tfds_rows.is_prepared(dataset, data_dir):
        return tfds_rows.tfds_size(dataset, split, data_dir, version=version)
    if "://" in data_dir or not official_files.has_official_files(dataset, split, data_dir):
        return None
    return sum(1 for _ in official_files.official_rows(dataset, split, data_dir))


def _rows(split: str, data_dir: str, *, dataset: str, version: str) -> Iterator[Row]:
    own_split = _split_at_source(dataset, split)
    if _uses_tfds(dataset, own_split, data_dir):
        folder = data_dir or _default_dir()
        return tfds_rows.tfds_rows(dataset, own_split, folder, version=version)
    return official_files.official_rows(dataset, own_split, data_dir)


def _fingerprint(split: str, data_dir: str, *, dataset: str, version: str) -> str:
    own_split = _split_at_source(dataset, split)
    if _uses_tfds(dataset, own_split, data_dir):
        folder = data_dir or _default_dir()
        return tfds_rows.tfds_fingerprint(dataset, own_split, folder, version=version)
    return official_files.official_fingerprint(dataset, own_split, data_dir)


def _remark(split: str, data_dir: str, *, dataset: str) -> str:
    own_split = _split_at_source(dataset, split)
    if _uses_tfds(dataset, own_split, data_dir):
        return ""
    return official_files.official_remark(dataset, own_split, data_dir)


def _split_at_source(dataset: str, split: str) -> str:
    return _SPLITS.get(dataset, {}).get(split, split)


def _uses_tfds(dataset: str, split: str, data_dir: str) -> bool:
    """Whether TFDS has the rows, rather than official files; UserError where neither does."""
    if not data_dir:
        if tfds_rows.is_prepared(dataset, _default_dir()):
            return True
        raise UserError(
            f"{dataset}: where is it? Set data.data_dir (--data_dir) to a folder of the official "
            f"files, or to one that TensorFlow Datasets prepared; {_default_dir()} holds none"
        )
    if "://" in data_dir:
        return True
    if not Path(data_dir).is_dir():
        raise UserError(f"data.data_dir (--data_dir) {data_dir}: there is no such folder")
    if tfds_rows.is_prepared(dataset, data_dir):
        return True
    if official_files.has_official_files(dataset, split, data_dir):
        return False
    raise UserError(
        f"{data_dir} holds no {dataset}, split {split!r}: neither data that TensorFlow Datasets "
        f"prepared ({dataset}/<version>/dataset_info.json) nor official files; looked for "
        f"{official_files.looked_for(dataset, split)}"
    )


def _default_dir() -> str:
    return os.environ.get("TFDS_DATA_DIR") or str(Path.home() / "tensorflow_datasets")
