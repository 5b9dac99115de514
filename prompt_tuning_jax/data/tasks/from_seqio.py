"""Wraps SeqIO's tasks and mixtures as tasks and mixtures of this library.

TensorFlow and SeqIO are imported inside the functions: importing them takes seconds.
"""

import hashlib
import importlib.metadata
import json
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prompt_tuning_jax.data.tasks.code_digest import code_digest
from prompt_tuning_jax.data.tasks.metrics import Metric
from prompt_tuning_jax.data.tasks.task import Example, Mixture, Postprocess, Row, Source, Task
from prompt_tuning_jax.errors import UserError, suggest

if TYPE_CHECKING:
    import seqio

_PACKAGES = ("seqio", "tensorflow", "tensorflow-datasets")


def names_in_seqio() -> tuple[str, ...]:
    """Returns the names of SeqIO's tasks and mixtures, without those of ``to_seqio``."""
    import seqio

    names = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    return tuple(sorted(name for name in names if not _is_ours(name)))


def from_seqio(name: str) -> Task | Mixture:
    """Wraps a registered SeqIO task, or a mixture with its rates; UserError for an unknown name.

    The texts are ``inputs_pretokenized`` and ``targets_pretokenized``.  If a preprocessor produces
    only ids, they are decoded with the task's vocabulary.  Ids that a preprocessor adds or changes
    after tokenization, such as task-index tokens, are lost.  The example keeps all other features:
    bytes as text, and arrays as lists.

    The task's ``postprocess_fn`` and its metrics over predictions get what SeqIO's evaluator passes
    them, but texts instead of ids.  Metrics over scores are left out.  Labels are the
    ``label_classes`` of a postprocessor made with ``functools.partial`` (as in T5's classification
    tasks); otherwise there are none.
    """
    import seqio

    if name in seqio.TaskRegistry.names():
        return _wrap_task(seqio.TaskRegistry.get(name))
    if name not in seqio.MixtureRegistry.names():
        raise UserError(
            f"unknown SeqIO task or mixture {name!r}: {suggest(name, names_in_seqio())}"
        )
    mixture = seqio.MixtureRegistry.get(name)
    rates = {task.name: float(mixture.get_rate(task)) for task in mixture.tasks}
    # In SeqIO, a rate of 0 marks a task that is only evaluated.
    return Mixture(
        name=name,
        tasks=tuple(_wrap_task(task) for task in mixture.tasks if rates[task.name]),
        rates=tuple(rate for rate in rates.values() if rate),
        evaluated=tuple(_wrap_task(task) for task in mixture.tasks if not rates[task.name]),
        description="SeqIO mixture",
    )


def _wrap_task(task: "seqio.Task") -> Task:
    return Task(
        name=task.name,
        source=Source(
            splits=_splits(task),
            rows=lambda split, data_dir: _rows(_in_folder(task, data_dir), split),
            fingerprint=lambda split, data_dir: _fingerprint(_in_folder(task, data_dir), split),
        ),
        labels=_label_classes(task),
        metrics=tuple(_wrap_metric(fn) for fn in task.predict_metric_fns),
        postprocess=_wrap_postprocess(task),
        description=f"SeqIO task, {task.source}",
    )


def set_data_dir(data_dir: str) -> None:
    """Sets the folder in which SeqIO's tasks look for TensorFlow Datasets data."""
    import seqio

    seqio.set_tfds_data_dir_override(data_dir)


def _in_folder(task: "seqio.Task", data_dir: str) -> "seqio.Task":
    """Returns the task, whose source of TensorFlow Datasets now looks in this folder, if any."""
    import seqio

    if data_dir and isinstance(task.source, seqio.TfdsDataSource):
        task.source.tfds_dataset.override_data_dir(data_dir)
    return task


def _splits(task: "seqio.Task") -> tuple[str, ...]:
    """Returns the splits of the task; UserError if the data that list them are missing."""
    try:
        return tuple(task.splits)
    except Exception as error:  # from TFDS, the file system or the task's code
        raise UserError(_no_data(task, error)) from None


def _no_data(task: "seqio.Task", error: Exception) -> str:
    import seqio

    first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    if not isinstance(task.source, seqio.TfdsDataSource):
        return f"SeqIO task {task.name!r}: its data cannot be opened: {first}"
    name = task.source.tfds_dataset.name
    folder = task.source.tfds_dataset.data_dir
    return (
        f"SeqIO task {task.name!r}: {name} is not prepared in {folder or '~/tensorflow_datasets'} "
        f"({first}); name the folder that holds it (--data_dir), or prepare it with "
        f"`tfds build {name.partition(':')[0]}`"
    )


def _rows(task: "seqio.Task", split: str) -> Iterator[Row]:
    try:
        dataset = task.get_dataset(sequence_length=None, split=split, shuffle=False)
    # TFDS asserts that the data exist; sources of files raise ValueError without any.
    except (AssertionError, OSError, ValueError) as error:
        raise UserError(_no_data(task, error)) from None
    for features in dataset.as_numpy_iterator():
        texts = {key: _text_of(task, key, features) for key in ("inputs", "targets")}
        for key in ("inputs", "targets"):
            features.pop(key, None)
            features.pop(f"{key}_pretokenized", None)
        yield {**{key: _to_json(value) for key, value in features.items()}, **texts}


def _text_of(task: "seqio.Task", key: str, features: Mapping[str, Any]) -> str:
    pretokenized = features.get(f"{key}_pretokenized")
    if isinstance(pretokenized, bytes):
        return pretokenized.decode()
    value = features.get(key)
    if isinstance(value, bytes):
        return value.decode()
    if value is None:  # a decoder-only task: the whole text is the target
        return ""
    return str(task.output_features[key].vocabulary.decode([int(token) for token in value]))


def _fingerprint(task: "seqio.Task", split: str) -> str:
    import seqio

    parts = [task.name, split, str(task.source), code_digest(list(task.preprocessors))]
    parts += [f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES]
    if isinstance(task.source, seqio.TfdsDataSource):
        # The text of the source lacks which part of the data a split is.
        dataset = task.source.tfds_dataset
        try:
            parts += [repr(dataset), str(dataset.size(split))]
        except Exception as error:  # from TFDS or the file system
            raise UserError(_no_data(task, error)) from None
    if isinstance(task.source, seqio.TextLineDataSource):
        parts.append(str(task.source._skip_header_lines))
    if isinstance(task.source, seqio.FunctionDataSource):
        parts.append(code_digest(task.source._dataset_fn))
    if isinstance(task.source, seqio.FileDataSource):
        for file in sorted(task.source.list_shards(split)):
            parts.append(file)
            if Path(file).is_file():  # it may be in a bucket
                stat = Path(file).stat()
                parts.append(f"{stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _label_classes(task: "seqio.Task") -> tuple[str, ...]:
    keywords = getattr(task.postprocessor, "keywords", None) or {}
    return tuple(str(label) for label in keywords.get("label_classes") or ())


def _wrap_postprocess(task: "seqio.Task") -> Postprocess:
    def postprocess(text: str, example: Example, is_target: bool) -> Any:
        features = {key: _from_json(value) for key, value in example.items()}
        for key in ("inputs", "targets"):
            features[f"{key}_pretokenized"] = features[key]
        return task.postprocess_fn(text, example=features, is_target=is_target)

    return postprocess


def _wrap_metric(metric_fn: Callable[..., Mapping[str, Any]]) -> Metric:
    def compute(targets: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
        results = metric_fn(targets, predictions)
        # Metrics may also return texts and images, and may wrap numbers as Scalar.
        plain = {name: getattr(value, "value", value) for name, value in results.items()}
        return {name: float(v) for name, v in plain.items() if isinstance(v, numbers.Real)}

    name = getattr(metric_fn, "__name__", type(metric_fn).__name__)
    return Metric(name=name, fn=compute)


def _to_json(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="surrogateescape")
    if isinstance(value, np.ndarray | np.generic):
        return _to_json(value.tolist())
    if hasattr(value, "to_list"):  # ragged
        return _to_json(value.to_list())
    if isinstance(value, list):
        return [_to_json(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _to_json(item) for key, item in value.items()}
    return value


def _from_json(value: Any) -> Any:
    """Converts JSON values back to what SeqIO passes postprocessors: bytes, numpy values."""
    if isinstance(value, str):
        return value.encode(errors="surrogateescape")
    if isinstance(value, dict):
        return {key: _from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        items = [_from_json(item) for item in value]
        texts = any(isinstance(item, bytes | list) for item in items)
        return np.array(items, dtype=object) if texts else np.array(items)
    return np.asarray(value)[()]


def _is_ours(name: str) -> bool:
    import seqio

    source = name in seqio.TaskRegistry.names() and seqio.TaskRegistry.get(name).source
    return hasattr(getattr(source, "_dataset_fn", None), "from_prompt_tuning_jax")
