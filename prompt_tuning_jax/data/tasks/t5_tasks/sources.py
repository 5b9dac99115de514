"""Reads rows of a data set from ``data_dir``: prepared by TensorFlow Datasets, or official files.

Prepared data are in ``data_dir/<name>/<config>/<version>``, with a ``dataset_info.json``.
TensorFlow is imported only to read rows, not to find data sets and their sizes.
"""

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from prompt_tuning_jax.data.tasks.t5_tasks import official_files
from prompt_tuning_jax.data.tasks.t5_tasks.t5_task import T5Task
from prompt_tuning_jax.data.tasks.task import Row, Source
from prompt_tuning_jax.errors import UserError, suggest
from prompt_tuning_jax.untrusted_input import read_json_file

_INFO = "dataset_info.json"
_VERSION = re.compile(r"\d+\.\d+\.\d+")
# Columns that tasks read from wide rows, if the version has them; tokens are larger than texts.
_COLUMNS = {
    "mrqa": ("subset", "context", "qid", "question", "answers"),
    "cnn_dailymail": ("article", "highlights", "id"),
}

# Keys of Python class names in features.json: in protobuf's JSON, and in older versions.
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")

_log = logging.getLogger(__name__)


def is_prepared(dataset: str, data_dir: str) -> bool:
    """Returns whether ``data_dir`` (a folder or gs://...) has any version of the data set."""
    return _any_version(dataset, data_dir) is not None


def tfds_rows(dataset: str, split: str, data_dir: str, *, version: str = "") -> Iterator[Row]:
    """Yields the rows of a split in TFDS's order, as Python values: text as str, arrays as lists.

    Args:
      dataset: TFDS's name without version: ``super_glue/rte``.
      split: one of the data set's splits.
      data_dir: as in TFDS; may be a bucket (gs://...).
      version: the version to read if it exists; otherwise the newest is read and logged.

    Raises UserError if tensorflow-datasets is missing, if the data set is not prepared there or has
    no such split, and for damaged files.  Nothing is downloaded.
    """
    folder = _folder(dataset, data_dir, version)
    _check_split(dataset, split, folder)
    if (folder / "features.json").exists():
        _require_own_features(folder)
    tfds = _import_tfds()
    import tensorflow as tf

    builder = _builder(tfds, dataset, folder, data_dir)
    columns = _COLUMNS.get(dataset.partition("/")[0])
    decoders = None
    if columns:
        kept = {name for name in columns if name in builder.info.features}
        decoders = tfds.decode.PartialDecoding(kept)
    try:
        # One file at a time, so that the order does not depend on the number of processors.
        rows = builder.as_dataset(
            split=split,
            shuffle_files=False,
            decoders=decoders,
            read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
        )
        for row in tfds.as_numpy(rows):
            yield {name: _plain(value) for name, value in sorted(row.items())}
    except (tf.errors.OpError, OSError) as error:
        first = str(error).splitlines()[0][:200]
        raise UserError(
            f"{folder}: split {split!r} of {dataset} cannot be read, its files are missing or "
            f"damaged: {first}"
        ) from None


def tfds_size(dataset: str, split: str, data_dir: str, *, version: str = "") -> int:
    """Returns the number of rows of a split, from its dataset_info.json."""
    folder = _folder(dataset, data_dir, version)
    return _check_split(dataset, split, folder)


def tfds_fingerprint(dataset: str, split: str, data_dir: str, *, version: str = "") -> str:
    """Returns a string that changes with the description and the file sizes of prepared data."""
    folder = _folder(dataset, data_dir, version)
    digest = hashlib.sha256(f"{dataset} {split}".encode())
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode())
        if path.name.endswith(".json"):
            digest.update(path.read_bytes())
        else:
            stat = path.stat()
            # For buckets, etils calls the size ``length``.
            digest.update(f"{getattr(stat, 'st_size', getattr(stat, 'length', 0))}".encode())
    return digest.hexdigest()


def _folder(dataset: str, data_dir: str, version: str) -> Path:
    parent = _any_version(dataset, data_dir)
    if parent is None:
        raise _not_prepared(dataset, data_dir)
    versions = _versions(parent)
    if version in versions:
        return parent / version
    newest = max(versions, key=lambda name: tuple(map(int, name.split("."))))
    if version:
        _say_once(dataset, version, newest, data_dir)
    return parent / newest


def _not_prepared(dataset: str, data_dir: str) -> UserError:
    return UserError(
        f"{data_dir}: no prepared {dataset}; prepare it with "
        f"`tfds build {dataset} --data_dir {data_dir}` (needs the network)"
    )


@cache
def _say_once(dataset: str, version: str, available: str, data_dir: str) -> None:
    _log.info("%s:%s is not in %s; reading version %s", dataset, version, data_dir, available)


def _any_version(dataset: str, data_dir: str) -> Path | None:
    """Returns the folder of the data set's versions; None if there is none."""
    if "://" not in data_dir:
        return _find_versions(dataset, Path(data_dir))
    bucket: Path = _import_tfds().core.Path(data_dir)  # the equivalent of a Path for buckets
    try:
        return _find_versions(dataset, bucket)
    except Exception as error:  # network, credentials, unsupported file systems
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"data.data_dir (--data_dir) {data_dir} cannot be read: {first}") from None


def _find_versions(dataset: str, data_dir: Path) -> Path | None:
    base = data_dir / dataset
    if not base.is_dir():
        return None
    if _versions(base):
        return base
    if "/" in dataset:
        return None
    # Older versions have a folder for the config: cnn_dailymail/plain_text/3.0.0.
    return next((child for child in sorted(base.iterdir()) if _versions(child)), None)


def _versions(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    names = [child.name for child in folder.iterdir() if _VERSION.fullmatch(child.name)]
    return [name for name in names if (folder / name / _INFO).exists()]


def _check_split(dataset: str, split: str, folder: Path) -> int:
    try:
        info = read_json_file(folder / _INFO)
        sizes = {s["name"]: sum(map(int, s["shardLengths"])) for s in info["splits"]}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder / _INFO}: cannot be read, or damaged") from None
    if split not in sizes:
        raise UserError(f"{folder}: {dataset} has no split {split!r}: {suggest(split, sizes)}")
    return sizes[split]


def _require_own_features(folder: Path) -> None:
    """Raises UserError if features.json names a Python class from outside TFDS.

    tensorflow-datasets imports the module of every class that a feature names.
    """
    try:
        features = read_json_file(folder / "features.json")
    except UserError:
        raise UserError(
            f"{folder}: tensorflow-datasets cannot open it (features.json is damaged); prepare it "
            "again"
        ) from None
    stack = [features]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            for key, item in value.items():
                is_class = key in _CLASS_KEYS and isinstance(item, str)
                if is_class and not item.startswith("tensorflow_datasets."):
                    raise UserError(
                        f"{folder / 'features.json'} names the Python class {item!r}, which is "
                        "not one of tensorflow-datasets; it is not imported"
                    )
                stack.append(item)
        elif isinstance(value, list):
            stack += value


def _builder(tfds: Any, dataset: str, folder: Path, data_dir: str) -> Any:
    try:
        if (folder / "features.json").exists():
            return tfds.builder_from_directory(folder)
        # Data prepared by an old TFDS have no features.json; the code defines the features.
        return tfds.builder(f"{dataset}:{folder.name}", data_dir=data_dir)
    except Exception as error:  # many types: names, versions, checksums, protobufs
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(
            f"{folder}: tensorflow-datasets cannot open it ({first}); prepare it again with "
            f"`tfds build {dataset}`"
        ) from None


def _import_tfds() -> Any:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(
            "data prepared by TensorFlow Datasets needs packages: pip install tensorflow "
            f"tensorflow-datasets ({error}); or set data.data_dir to a folder of official files"
        ) from None
    return tfds


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if hasattr(value, "tolist"):  # numpy's numbers and arrays
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


# The one labeled split of MRQA's out-of-domain sets: test in TFDS, validation in the paper.
_OUT_OF_DOMAIN = ("bio_asq", "drop", "duo_rc", "race", "relation_extraction", "textbook_qa")
_SPLITS: Mapping[str, Mapping[str, str]] = {
    f"mrqa/{short}": {"validation": "test"} for short in _OUT_OF_DOMAIN
}


def source_of(task: T5Task) -> Source:
    """Returns the source of a task's rows, with the task's names of the splits.

    ``data_dir`` has data that TFDS prepared (it may be gs://...) or official files (see
    ``official_files``).  If it is empty, TFDS's default is used: $TFDS_DATA_DIR or
    ~/tensorflow_datasets.
    """
    dataset, _, version = task.tfds.partition(":")
    return Source(
        splits=task.splits,
        rows=partial(_rows, dataset=dataset, version=version),
        fingerprint=partial(_fingerprint, dataset=dataset, version=version),
        note=partial(_note, dataset=dataset),
    )


def number_of_rows(task: T5Task, split: str, data_dir: str) -> int | None:
    """Returns the number of rows of a split; None if ``data_dir`` does not have it.

    Official files are read to count them, which may raise UserError.
    """
    dataset, _, version = task.tfds.partition(":")
    split = _split_at_source(dataset, split)
    if is_prepared(dataset, data_dir):
        return tfds_size(dataset, split, data_dir, version=version)
    if "://" in data_dir or not official_files.has_official_files(dataset, split, data_dir):
        return None
    return sum(1 for _ in official_files.official_rows(dataset, split, data_dir))


def _rows(split: str, data_dir: str, *, dataset: str, version: str) -> Iterator[Row]:
    source_split = _split_at_source(dataset, split)
    if _uses_tfds(dataset, source_split, data_dir):
        folder = data_dir or _default_dir()
        return tfds_rows(dataset, source_split, folder, version=version)
    return official_files.official_rows(dataset, source_split, data_dir)


def _fingerprint(split: str, data_dir: str, *, dataset: str, version: str) -> str:
    source_split = _split_at_source(dataset, split)
    if _uses_tfds(dataset, source_split, data_dir):
        folder = data_dir or _default_dir()
        return tfds_fingerprint(dataset, source_split, folder, version=version)
    return official_files.official_fingerprint(dataset, source_split, data_dir)


def _note(split: str, data_dir: str, *, dataset: str) -> str:
    source_split = _split_at_source(dataset, split)
    if _uses_tfds(dataset, source_split, data_dir):
        return ""
    return official_files.official_note(dataset, source_split, data_dir)


def _split_at_source(dataset: str, split: str) -> str:
    return _SPLITS.get(dataset, {}).get(split, split)


def _uses_tfds(dataset: str, split: str, data_dir: str) -> bool:
    """Returns whether TFDS has the rows, rather than official files; UserError if neither does."""
    if not data_dir:
        if is_prepared(dataset, _default_dir()):
            return True
        raise UserError(
            f"{dataset} is not in {_default_dir()}: set data.data_dir (--data_dir) to a folder of "
            "the official files, or to one that TensorFlow Datasets prepared"
        )
    if "://" in data_dir:
        return True
    if not Path(data_dir).is_dir():
        raise UserError(f"data.data_dir (--data_dir) {data_dir}: no such folder")
    if is_prepared(dataset, data_dir):
        return True
    if dataset not in official_files.layout():
        raise _not_prepared(dataset, data_dir)
    if official_files.has_official_files(dataset, split, data_dir):
        return False
    raise UserError(
        f"{data_dir} has no {dataset}, split {split!r}: neither data that TensorFlow Datasets "
        f"prepared ({dataset}/<version>/dataset_info.json) nor official files; looked for "
        f"{official_files.looked_for(dataset, split)}"
    )


def _default_dir() -> str:
    return os.environ.get("TFDS_DATA_DIR") or str(Path.home() / "tensorflow_datasets")
