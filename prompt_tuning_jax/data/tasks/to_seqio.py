"""Registers tasks and mixtures of this library in SeqIO.

TensorFlow and SeqIO are imported inside the functions: importing them takes seconds.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from prompt_tuning_jax.data.tasks.metrics import Metric
from prompt_tuning_jax.data.tasks.registry import get_mixture
from prompt_tuning_jax.data.tasks.task import Task, task_index_id
from prompt_tuning_jax.data.vocabularies.hf_tokenizer import HfTokenizer
from prompt_tuning_jax.data.vocabularies.vocab import (
    DEFAULT_SENTINELS,
    ByteVocabulary,
    TextVocabulary,
)
from prompt_tuning_jax.errors import UserError

if TYPE_CHECKING:
    import seqio
    import tensorflow as tf


def register_in_seqio(
    vocabulary: TextVocabulary, *, names: Sequence[str] = ("word_valence",), data_dir: str = ""
) -> None:
    """Registers tasks and mixtures of this library in SeqIO under their names, for T5X users.

    The ids equal those of ``tokenize``: SeqIO's vocabulary encodes with the same file, and EOS is
    appended after trimming.  Each example also has the feature ``example_json`` with all its
    fields.  Members of a mixture are registered with it.
    """
    register_with_seqio_vocabulary(_to_seqio_vocabulary(vocabulary), names=names, data_dir=data_dir)


def register_with_seqio_vocabulary(
    vocabulary: "seqio.Vocabulary",
    *,
    names: Sequence[str],
    data_dir: str = "",
    skip_known: bool = False,
) -> None:
    """``register_in_seqio`` with a SeqIO vocabulary, whose file need not be read until it is used.

    With ``skip_known``, names that are already registered in SeqIO are left unchanged.
    """
    import seqio

    for name in names:
        mixture = get_mixture(name)
        members = (*mixture.tasks, *mixture.evaluated)
        if len(members) == 1 and members[0].name == mixture.name:
            if not (skip_known and _is_registered(name)):
                _register_task(members[0], name, vocabulary, data_dir)
            continue
        for task in members:
            if not _is_registered(task.name):
                _register_task(task, task.name, vocabulary, data_dir)
        rates = (*mixture.rates, *(0.0 for _ in mixture.evaluated))
        if not (skip_known and _is_registered(name)):
            seqio.MixtureRegistry.add(
                name, [(task.name, rate) for task, rate in zip(members, rates, strict=True)]
            )


def seqio_vocabulary(path: str) -> "seqio.Vocabulary":
    """Returns T5's vocabulary: a SentencePiece file and 100 sentinels, or ``bytes`` for ByT5's.

    The file, which may be in a bucket, is read on first use.
    """
    import seqio

    if path == "bytes":
        return _to_seqio_vocabulary(ByteVocabulary())
    return seqio.SentencePieceVocabulary(path, extra_ids=DEFAULT_SENTINELS)


def _is_registered(name: str) -> bool:
    import seqio

    return name in seqio.TaskRegistry.names() or name in seqio.MixtureRegistry.names()


def _register_task(task: Task, name: str, vocabulary: "seqio.Vocabulary", data_dir: str) -> None:
    import seqio

    index = () if task.index is None else (partial(_index_before_inputs, index=task.index),)
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(_dataset_fn(task, data_dir), splits=task.splits),
        preprocessors=[
            seqio.preprocessors.tokenize,
            *index,
            seqio.CacheDatasetPlaceholder(),
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features={
            key: seqio.Feature(vocabulary=vocabulary, add_eos=True) for key in ("inputs", "targets")
        },
        postprocess_fn=_to_seqio_postprocess(task),
        metric_fns=[_to_seqio_metric(metric) for metric in task.metrics],
    )


def _index_before_inputs(
    dataset: "tf.data.Dataset", output_features: Mapping[str, Any], *, index: int
) -> "tf.data.Dataset":
    import tensorflow as tf

    token = task_index_id(output_features["inputs"].vocabulary.vocab_size, index)
    return dataset.map(
        lambda example: {**example, "inputs": tf.concat([[token], example["inputs"]], axis=0)}
    )


def _dataset_fn(task: Task, data_dir: str) -> Callable[..., "tf.data.Dataset"]:
    def dataset_fn(
        split: str, shuffle_files: bool = False, seed: int | None = None
    ) -> "tf.data.Dataset":
        del shuffle_files, seed
        import tensorflow as tf

        def generate() -> Iterator[dict[str, str]]:
            for example in task.load(split, data_dir):
                yield {
                    "inputs": example["inputs"],
                    "targets": example["targets"],
                    "example_json": json.dumps(example),
                }

        text = tf.TensorSpec((), tf.string)
        signature = {"inputs": text, "targets": text, "example_json": text}
        return tf.data.Dataset.from_generator(generate, output_signature=signature)

    dataset_fn.from_prompt_tuning_jax = True  # type: ignore[attr-defined]
    return dataset_fn


def _to_seqio_vocabulary(vocabulary: TextVocabulary) -> "seqio.Vocabulary":
    import seqio

    if isinstance(vocabulary, ByteVocabulary):
        return seqio.ByteVocabulary(extra_ids=vocabulary.extra_ids)
    if isinstance(vocabulary, HfTokenizer):
        raise UserError(
            f"{vocabulary.path}: SeqIO reads SentencePiece files and bytes, not a tokenizer.json; "
            "set model.vocabulary to the model's SentencePiece file"
        )
    if vocabulary.has_added_tokens:
        raise UserError(
            f"{vocabulary.path}: the files beside it add tokens, which SeqIO does not read; copy "
            "the SentencePiece file to a folder of its own, and set model.vocabulary to it"
        )
    return seqio.SentencePieceVocabulary(str(vocabulary.path), extra_ids=vocabulary.extra_ids)


def _to_seqio_postprocess(task: Task) -> Callable[..., Any]:
    def postprocess(
        text: str, *, example: Mapping[str, Any], is_target: bool = False, **_: Any
    ) -> Any:
        if task.postprocess is None:
            return text
        return task.postprocess(text, json.loads(example["example_json"]), is_target)

    return postprocess


def _to_seqio_metric(metric: Metric) -> Callable[..., dict[str, float]]:
    def compute(targets: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
        value = metric.fn(targets, predictions)
        return dict(value) if isinstance(value, Mapping) else {metric.name: value}

    compute.__name__ = metric.name
    return compute
