"""GLUE's tasks, and transfer between its two paraphrase tasks; see ``tables``."""

from dataclasses import replace
from functools import partial
from typing import Any

from prompt_tuning_jax.data.tasks.t5_tasks import metrics, preprocess
from prompt_tuning_jax.data.tasks.t5_tasks.postprocess import (
    DUPLICATE_TO_EQUIVALENT,
    EQUIVALENT_TO_DUPLICATE,
    class_id,
    number,
    translated,
)
from prompt_tuning_jax.data.tasks.t5_tasks.t5_task import T5Task

_ACCURACY = (metrics.ACCURACY,)
_F1_ACCURACY = (metrics.F1_WITH_INVALID, metrics.ACCURACY)
_ENTAILMENT = ("entailment", "not_entailment")
_NLI = ("entailment", "neutral", "contradiction")


def labeled_task(
    benchmark: str,
    short: str,
    *,
    versions: tuple[str, str],
    task_word: str,
    fields: tuple[str, ...],
    labels: tuple[str, ...],
    **changes: Any,
) -> T5Task:
    """Returns a task with named fields and labels.

    ``versions`` are those of its name and of TFDS.
    """
    of_name, of_tfds = versions
    task = T5Task(
        name=f"{benchmark}_{short}_{of_name}",
        benchmark=benchmark,
        short=short,
        tfds=f"{benchmark}/{short}:{of_tfds}",
        preprocess=partial(
            preprocess.labeled_text, task_word=task_word, fields=fields, labels=labels
        ),
        postprocess=partial(class_id, labels=labels),
        labels=labels,
        metrics=_ACCURACY,
    )
    return replace(task, **changes)


def _glue(
    short: str,
    *,
    fields: tuple[str, ...] = (),
    labels: tuple[str, ...] = (),
    **changes: Any,
) -> T5Task:
    return labeled_task(
        "glue",
        short,
        versions=("v002", "1.0.0"),
        # The matched, mismatched and diagnostic sets all use the task word of MNLI.
        task_word="mnli" if short.startswith("mnli") or short == "ax" else short,
        fields=fields,
        labels=labels,
        **changes,
    )


_SENTENCES = ("sentence1", "sentence2")
_QUESTIONS = ("question1", "question2")
_HYPOTHESIS = ("hypothesis", "premise")
_MRPC_LABELS = ("not_equivalent", "equivalent")
_QQP_LABELS = ("not_duplicate", "duplicate")
_MNLI_SPLITS = (
    "train",
    "validation_matched",
    "validation_mismatched",
    "test_matched",
    "test_mismatched",
)

# TFDS can still read prepared data of version 1.0.0, but can no longer build them.
_GLUE_V002 = (
    _glue(
        "cola",
        fields=("sentence",),
        labels=("unacceptable", "acceptable"),
        metrics=(metrics.MATTHEWS,),
        index=0,
        rate=8_551,
        description="is a sentence grammatical?",
    ),
    _glue(
        "sst2",
        fields=("sentence",),
        labels=("negative", "positive"),
        index=6,
        rate=67_349,
        description="is a phrase of a film review positive?",
    ),
    _glue(
        "mrpc",
        fields=_SENTENCES,
        labels=_MRPC_LABELS,
        metrics=_F1_ACCURACY,
        index=2,
        rate=3_668,
        description="are two sentences paraphrases?",
    ),
    _glue(
        "qqp",
        fields=_QUESTIONS,
        labels=_QQP_LABELS,
        metrics=_F1_ACCURACY,
        index=4,
        rate=363_849,
        description="are two questions the same?",
    ),
    _glue(
        "stsb",
        preprocess=preprocess.stsb,
        postprocess=number,
        metrics=(metrics.PEARSON, metrics.SPEARMAN),
        index=7,
        rate=5_749,
        description="how similar are two sentences, 0.0 to 5.0?",
    ),
    _glue(
        "mnli",
        fields=_HYPOTHESIS,
        labels=_NLI,
        splits=_MNLI_SPLITS,
        index=1,
        rate=392_702,
        description="does the premise entail or contradict the hypothesis?",
    ),
    *(
        _glue(
            short,
            fields=_HYPOTHESIS,
            labels=_NLI,
            splits=("validation", "test"),
            index=1,
            description=f"MNLI's {genre}",
        )
        for short, genre in (
            ("mnli_matched", "genres of the training set"),
            ("mnli_mismatched", "genres that the training set lacks"),
        )
    ),
    _glue(
        "qnli",
        fields=("question", "sentence"),
        labels=_ENTAILMENT,
        index=3,
        rate=104_743,
        description="does a sentence answer a question?",
    ),
    _glue(
        "rte",
        fields=_SENTENCES,
        labels=_ENTAILMENT,
        index=5,
        rate=2_490,
        description="does the first sentence entail the second?",
    ),
    _glue(
        "wnli",
        fields=_SENTENCES,
        # The reverse of the class numbers of RTE and QNLI.
        labels=("not_entailment", "entailment"),
        index=8,
        description="does the sentence with its pronoun filled in follow?",
    ),
    _glue(
        "ax",
        fields=_HYPOTHESIS,
        labels=_NLI,
        splits=("test",),
        metrics=(),
        index=1,
        description="MNLI's diagnostics, whose labels are not public",
    ),
)
_BY_SHORT = {task.short: task for task in _GLUE_V002}

GLUE = (
    *_GLUE_V002,
    *(
        replace(task, name=f"glue_{task.short}_v200", tfds=f"glue/{task.short}:2.0.0")
        for task in _GLUE_V002
    ),
)

# Evaluate a prompt of one paraphrase task on the other; labels are translated before scoring.
TRANSFER = (
    replace(
        _BY_SHORT["mrpc"],
        name="glue_mrpc_from_qqp_v002",
        splits=("validation",),
        postprocess=translated(partial(class_id, labels=_MRPC_LABELS), DUPLICATE_TO_EQUIVALENT),
        labels=_QQP_LABELS,
        rate=0,
        description="MRPC by a model that answers as for QQP",
    ),
    replace(
        _BY_SHORT["qqp"],
        name="glue_qqp_from_mrpc_v002",
        splits=("validation",),
        postprocess=translated(partial(class_id, labels=_QQP_LABELS), EQUIVALENT_TO_DUPLICATE),
        labels=_MRPC_LABELS,
        rate=0,
        description="QQP by a model that answers as for MRPC",
    ),
)
