"""The metrics of the T5 paper's tasks, with the names and values of ``t5`` 0.9.4.

All are in percent and compare the results of ``postprocess`` for targets and predictions.  The
arithmetic has the original's order, so that values agree to the last digit.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from prompt_tuning_jax.data.tasks.metric_functions import pearson, rouge_f1, spearman, squad
from prompt_tuning_jax.data.tasks.metrics import Metric
from prompt_tuning_jax.errors import UserError

_ROUGE_KEYS = ("rouge1", "rouge2", "rougeLsum")


def accuracy(targets: Sequence[Any], predictions: Sequence[Any]) -> float:
    """Returns the percentage of predictions that equal their targets."""
    hits = sum(bool(t == p) for t, p in zip(targets, predictions, strict=True))
    return 100 * (hits / len(targets))


def f1_with_invalid(targets: Sequence[int], predictions: Sequence[int]) -> float:
    """Returns the F1 of class 1.

    A prediction that is neither 0 nor 1 counts as the opposite of its target.
    """
    from sklearn.metrics import f1_score

    counted = [p if p in (0, 1) else 1 - t for t, p in zip(targets, predictions, strict=True)]
    return 100 * float(f1_score(targets, counted, zero_division=0))


def mean_multiclass_f1(num_classes: int) -> Metric:
    """Returns the mean F1 over the classes; 0 for a class that does not occur."""
    return Metric(
        name=f"mean_{num_classes}class_f1", fn=partial(_mean_f1, classes=range(num_classes))
    )


def _mean_f1(targets: Sequence[int], predictions: Sequence[int], *, classes: range) -> float:
    from sklearn.metrics import fbeta_score

    return 100 * float(
        fbeta_score(
            targets, predictions, beta=1, labels=list(classes), average="macro", zero_division=0
        )
    )


def matthews(targets: Sequence[int], predictions: Sequence[int]) -> float:
    """Returns Matthews' correlation; invalid predictions form a separate class."""
    from sklearn.metrics import matthews_corrcoef

    return 100 * float(matthews_corrcoef(targets, predictions))


def multirc_f1(
    targets: Sequence[Mapping[str, Any]], predictions: Sequence[Mapping[str, Any]]
) -> float:
    """Returns F1 over all answers to all questions (F1a)."""
    return f1_with_invalid([t["value"] for t in targets], [p["value"] for p in predictions])


def multirc_exact_match(
    targets: Sequence[Mapping[str, Any]], predictions: Sequence[Mapping[str, Any]]
) -> float:
    """Returns the percentage of questions whose answers are all judged correctly.

    Questions are the groups of the targets.
    """
    hits: dict[Any, list[bool]] = defaultdict(list)
    for target, prediction in zip(targets, predictions, strict=True):
        hits[target["group"]].append(target["value"] == prediction["value"])
    return float(np.mean([100.0 * all(group) for group in hits.values()]))


def record(
    targets: Sequence[Mapping[str, Any]], predictions: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Returns SQuAD's scores, for the first prediction of each gap (group of the targets)."""
    first: dict[Any, tuple[Any, Any]] = {}
    for target, prediction in zip(targets, predictions, strict=True):
        first.setdefault(target["group"], (target["value"], prediction["value"]))
    return squad([answers for answers, _ in first.values()], [text for _, text in first.values()])


def rouge(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Returns the mean F1 of ROUGE-1, ROUGE-2 and ROUGE-Lsum; " . " ends a sentence.

    The original returns medians of 1,000 unseeded random draws from the same values, which differ
    between runs by some hundredths around this mean.
    """
    return rouge_f1(targets, predictions, kinds=_ROUGE_KEYS)


ACCURACY = Metric(name="accuracy", fn=accuracy)
F1_WITH_INVALID = Metric(name="f1", fn=f1_with_invalid)
MATTHEWS = Metric(name="matthews_corrcoef", fn=matthews)
PEARSON = Metric(name="pearson_corrcoef", fn=pearson)
SPEARMAN = Metric(name="spearman_corrcoef", fn=spearman)
MULTIRC_F1 = Metric(name="f1", fn=multirc_f1)
MULTIRC_EXACT_MATCH = Metric(name="exact_match", fn=multirc_exact_match)
# These return several numbers; ``name`` is the one that selects the best checkpoint.
SQUAD = Metric(name="f1", fn=squad)
RECORD = Metric(name="f1", fn=record)
ROUGE = Metric(name="rougeLsum", fn=rouge)

# The metrics whose mean is the task's contribution to the SuperGLUE score.
SUPER_GLUE_METRICS: Mapping[str, tuple[str, ...]] = {
    "boolq": ("accuracy",),
    "cb": ("mean_3class_f1", "accuracy"),
    "copa": ("accuracy",),
    "multirc": ("f1", "exact_match"),
    "record": ("f1", "em"),
    "rte": ("accuracy",),
    "wic": ("accuracy",),
    "wsc": ("accuracy",),
}


def super_glue_task_score(task: str, scores: Mapping[str, float]) -> float:
    """Returns a task's contribution to the SuperGLUE score: the mean of its metrics.

    Args:
      task: one of ``SUPER_GLUE_METRICS``; UserError otherwise.
      scores: by metric name; others are ignored, and UserError if one is missing.
    """
    if task not in SUPER_GLUE_METRICS:
        raise UserError(f"{task!r} does not count in the SuperGLUE score: {_listed()} do")
    names = SUPER_GLUE_METRICS[task]
    if missing := [name for name in names if name not in scores]:
        raise UserError(f"the score of {task!r} needs {' and '.join(missing)}, which is not there")
    return sum(scores[name] for name in names) / len(names)


def super_glue_score(scores: Mapping[str, Mapping[str, float]]) -> float:
    """Returns the leaderboard's score: the mean of ``super_glue_task_score`` over the eight tasks.

    Args: scores: {task: {metric: percent}}; the diagnostics axb and axg are ignored.  UserError
    lists the missing tasks.
    """
    if missing := [task for task in SUPER_GLUE_METRICS if task not in scores]:
        raise UserError(
            f"the SuperGLUE score needs all of {_listed()}; missing: {_listed(missing)}"
        )
    shares = [super_glue_task_score(task, scores[task]) for task in SUPER_GLUE_METRICS]
    return sum(shares) / len(shares)


def _listed(tasks: Iterable[str] = SUPER_GLUE_METRICS) -> str:
    return ", ".join(tasks)
