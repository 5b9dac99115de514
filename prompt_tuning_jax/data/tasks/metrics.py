"""Metrics of predictions, in percent, and their directions.

A prediction outside the label set is wrong, never dropped.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from prompt_tuning_jax.data.tasks.metric_functions import (
    normalized,
    pearson,
    rouge_f1,
    spearman,
    word_f1,
)
from prompt_tuning_jax.data.tasks.text_metrics import bleu, coqa_f1, edit_distance, trivia_qa
from prompt_tuning_jax.errors import UserError, suggest

# (targets, predictions) -> percent, or several numbers by name.
MetricFn: TypeAlias = Callable[[Sequence[Any], Sequence[Any]], float | Mapping[str, float]]
# Whether the largest score is the best, or the smallest.
Direction: TypeAlias = Literal["max", "min"]

# The mean cross entropy per target token on the evaluation set.  It is not a metric of predictions:
# evaluation computes it with the model.
LOSS = "loss"
# The percent of predictions that are not labels; every task with labels has it.
INVALID = "invalid"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A named score; ``fn`` gets all targets and all predictions of a split, in the same order.

    If ``fn`` returns several numbers by name, ``name`` is not used.  ``direction`` is ``max`` if
    more is better and ``min`` if less is better; a mapping for several numbers.  Without one, it
    follows from common names (``direction_by_name``); for other names it must be given.
    """

    name: str
    fn: MetricFn
    direction: Direction | Mapping[str, Direction] | None = None

    def declared_direction(self, name: str) -> Direction | None:
        """Returns the direction of the metric's number of that name, if it declares one."""
        if isinstance(self.direction, Mapping):
            return self.direction.get(name)
        return self.direction if name == self.name else None


def score(
    metrics: Sequence[Metric], targets: Sequence[Any], predictions: Sequence[Any]
) -> dict[str, float]:
    """Computes all metrics -> {name: value}; raises ValueError if the lengths differ or are 0."""
    if len(targets) != len(predictions) or not targets:
        raise ValueError(f"{len(targets)} targets and {len(predictions)} predictions")
    scores: dict[str, float] = {}
    for metric in metrics:
        if metric is EVALUATION_LOSS:
            continue
        value = metric.fn(targets, predictions)
        named = value if isinstance(value, Mapping) else {metric.name: value}
        for name in named:
            if name in scores:
                raise UserError(
                    f"metric {metric.name!r} gives a score called {name!r}, and so does one before "
                    "it; drop one of them (data.metrics)"
                )
        scores.update({name: float(number) for name, number in named.items()})
    return scores


def is_better(score: float, than: float, direction: Direction) -> bool:
    """Returns whether a score is strictly better than another one.

    Scores that are not finite are worse than any number.
    """
    if not math.isfinite(score):
        return False
    if not math.isfinite(than):
        return True
    return score > than if direction == "max" else score < than


def best_of(scores: Iterable[float], direction: Direction) -> int:
    """Returns the index of the best score (the first of equal ones); 0 if none is finite."""
    best, best_score = 0, math.nan
    for index, score in enumerate(scores):
        if is_better(score, best_score, direction):
            best, best_score = index, score
    return best


def direction_by_name(name: str) -> Direction | None:
    """Returns the direction of a metric with a common name, with or without ``task/``.

    Returns None for others.

    Names with words for both directions, for instance ``loss_accuracy``, give None.
    """
    last = name.rsplit("/", maxsplit=1)[-1]
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", last).lower()
    words = {word for part in re.findall(r"[a-z0-9]+", spaced) for word in _stems(part)}
    lower, higher = bool(words & _LOWER_IS_BETTER), bool(words & _HIGHER_IS_BETTER)
    if lower == higher:
        return None
    return "min" if lower else "max"


def _stems(word: str) -> tuple[str, ...]:
    """Returns the word, the word without trailing digits (``rouge2``), and without a plural's s."""
    bare = word.rstrip("0123456789")
    return word, bare, word.removesuffix("s")


# Words in metrics' names, as in T5, SeqIO, scikit-learn and the papers.
_LOWER_IS_BETTER = frozenset(
    {
        *("loss", "losses", "nll", "xent", "entropy", "perplexity", "perplexities", "ppl"),
        *("bpb", "bpc", "bits", "divergence", "error", "err", "invalid", "wer", "cer", "ter"),
        *("distance", "edit", "levenshtein", "hamming", "mse", "mae", "rmse", "msle", "mape"),
        *("brier", "ece", "eer", "fpr", "fnr"),
    }
)
_HIGHER_IS_BETTER = frozenset(
    {
        *("accuracy", "accuracies", "acc", "f1", "fbeta", "em", "exact", "match"),
        *("precision", "recall", "bleu", "sacrebleu", "gleu", "rouge", "rougel", "rougelsum"),
        *("chrf", "meteor", "cider", "bertscore", "bleurt", "comet", "pearson", "pearsonr"),
        *("spearman", "spearmanr", "kendall", "matthews", "mcc", "kappa", "auc", "auroc"),
        *("auprc", "correlation", "corrcoef", "corr", "mrr", "ndcg", "iou", "jaccard"),
        *("similarity", "likelihood", "correct"),
    }
)


def metric_names() -> tuple[str, ...]:
    """Returns the names that ``get_metric`` knows."""
    return tuple(_FACTORIES)


def get_metric(name: str, *, labels: Sequence[str] = ()) -> Metric:
    """Returns a metric by its name, with its direction.

    Args:
      name: one of ``metric_names()``; UserError with the nearest name otherwise.
      labels: the label set, which ``f1_macro`` averages over (default: the targets),
        and which ``f1_binary`` (exactly two; the second is the positive class) and ``invalid``
        require; UserError if it does not fit.
    """
    if name not in _FACTORIES:
        raise UserError(f"unknown metric {name!r}: {suggest(name, _FACTORIES)}")
    if name == LOSS:
        return EVALUATION_LOSS
    direction: Direction | Mapping[str, Direction] = "min" if name == INVALID else "max"
    if name in _SEVERAL:
        direction = dict.fromkeys(*_SEVERAL[name])
    return Metric(name=name, fn=_FACTORIES[name](tuple(labels)), direction=direction)


def accuracy(targets: Sequence[Any], predictions: Sequence[Any]) -> float:
    """Returns the percentage of predictions that equal their target exactly."""
    if any(isinstance(target, list | tuple | Mapping) for target in targets):
        raise UserError("the metric accuracy is for one target per example, not for several")
    hits = sum(bool(t == p) for t, p in zip(targets, predictions, strict=True))
    return 100 * hits / len(targets)


def exact_match(targets: Sequence[str], predictions: Sequence[str]) -> float:
    """Returns the percentage of predictions that equal their target after stripping white space."""
    _require_texts("exact_match", targets, predictions)
    return accuracy([t.strip() for t in targets], [p.strip() for p in predictions])


def invalid_share(labels: Sequence[str], predictions: Sequence[str]) -> float:
    """Returns the percentage of predictions that are not labels."""
    known = set(labels)
    return 100 * sum(p not in known for p in predictions) / len(predictions)


def majority_class(targets: Sequence[str]) -> str:
    """Returns the most frequent target; of equally frequent ones the alphabetically first."""
    counts = Counter(targets)
    return min(counts, key=lambda target: (-counts[target], target))


def _f1_macro(labels: tuple[str, ...]) -> MetricFn:
    """Returns the mean of the labels' F1.

    A label that never occurs counts 0, as in T5's CB metric.
    """

    def f1_macro(targets: Sequence[Any], predictions: Sequence[Any]) -> float:
        from sklearn.metrics import f1_score

        _require_texts("f1_macro", targets, predictions)
        classes = {label: i for i, label in enumerate(labels or sorted(set(targets)))}
        # Invalid predictions are a separate class: misses, and no false positives.
        return 100 * float(
            f1_score(
                [classes.get(t, len(classes)) for t in targets],
                [classes.get(p, len(classes)) for p in predictions],
                labels=list(range(len(classes))),
                average="macro",
                zero_division=0,
            )
        )

    return f1_macro


def _f1_binary(labels: tuple[str, ...]) -> MetricFn:
    """Returns the F1 of the second label.

    An invalid prediction counts as the opposite of its target (T5).
    """
    if len(labels) != 2:
        raise UserError(
            f"metric 'f1_binary' needs exactly two labels (the second is the positive class), but "
            f"there are {len(labels)}: set data.labels, or use f1_macro"
        )
    positive = labels[1]

    def f1_binary(targets: Sequence[Any], predictions: Sequence[Any]) -> float:
        from sklearn.metrics import f1_score

        _require_texts("f1_binary", targets, predictions)
        truth = [t == positive for t in targets]
        guess = [
            p == positive if p in labels else not t for t, p in zip(truth, predictions, strict=True)
        ]
        return 100 * float(f1_score(truth, guess, zero_division=0))

    return f1_binary


def _invalid(labels: tuple[str, ...]) -> MetricFn:
    if not labels:
        raise UserError("metric 'invalid' needs a label set: set data.labels")
    return lambda targets, predictions: invalid_share(labels, predictions)


def _word_f1(targets: Sequence[str], predictions: Sequence[str]) -> float:
    """Returns the mean F1 of the words of target and prediction, normalized as for SQuAD."""
    _require_texts("f1", targets, predictions)
    pairs = [(normalized(t), normalized(p)) for t, p in zip(targets, predictions, strict=True)]
    # Texts of only articles and punctuation are equal, but have no words.
    return 100 * math.fsum(1.0 if t == p else word_f1(t, p) for t, p in pairs) / len(pairs)


def _correlation(name: str) -> MetricFn:
    """Returns Pearson's or Spearman's correlation of numbers as text; nan if one side is constant.

    A prediction that is not a number counts as the target value farthest from its target.
    """

    def correlation(targets: Sequence[str], predictions: Sequence[str]) -> float:
        numbers = [_finite(target) for target in targets]
        for target, number in zip(targets, numbers, strict=True):
            if number is None:
                raise UserError(
                    f"metric {name!r} compares numbers, and the target {str(target)[:40]!r} is not "
                    "one; choose another in data.metrics"
                )
        truth = [number for number in numbers if number is not None]
        low, high = min(truth), max(truth)
        guesses = []
        for target_number, prediction in zip(truth, predictions, strict=True):
            guess = _finite(prediction)
            farthest = low if target_number - low > high - target_number else high
            guesses.append(farthest if guess is None else guess)
        return pearson(truth, guesses) if name == "pearson" else spearman(truth, guesses)

    return correlation


def _require_texts(name: str, *compared: Sequence[Any]) -> None:
    """Raises UserError if a task's postprocessing returns other values than text."""
    for value in (value for values in compared for value in values):
        if not isinstance(value, str):
            raise UserError(
                f"metric {name!r} compares texts, but this task compares values of type "
                f"{type(value).__name__}; leave data.metrics empty for the task's metrics"
            )


def _finite(text: Any) -> float | None:
    try:
        number = float(text)
    except (ValueError, TypeError):
        return None
    return number if math.isfinite(number) else None


def _rouge(*kinds: str) -> MetricFn:
    """Returns the mean F1 of kinds of ROUGE, as in T5's tasks; one number, or several by name."""

    def rouge(targets: Sequence[str], predictions: Sequence[str]) -> float | dict[str, float]:
        _require_texts(kinds[0], targets, predictions)
        scores = rouge_f1(targets, predictions, kinds=kinds)
        return scores if len(kinds) > 1 else scores[kinds[0]]

    return rouge


def _edit_distance(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    _require_texts("edit_distance", targets, predictions)
    return edit_distance(targets, predictions)


def _of_texts(name: str, fn: MetricFn) -> MetricFn:
    """Returns the metric for texts, and targets of several.

    Raises UserError for tasks with other values.
    """

    def checked(targets: Sequence[Any], predictions: Sequence[str]) -> Any:
        several = [t if isinstance(t, list) else [t] for t in targets]
        _require_texts(name, *several, predictions)
        return fn(targets, predictions)

    return checked


def _no_predictions(targets: Sequence[Any], predictions: Sequence[Any]) -> float:
    raise TypeError("the loss is not a metric of predictions")


EVALUATION_LOSS = Metric(name=LOSS, fn=_no_predictions, direction="min")

_ROUGE_KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
# The numbers of metrics that return several, and their direction.
_SEVERAL: Mapping[str, tuple[tuple[str, ...], Direction]] = {
    "rouge": (_ROUGE_KINDS, "max"),
    "trivia_qa": (("em", "f1"), "max"),
    "edit_distance": (("min_edit", "max_edit", "mean_edit", "median_edit", "sum_edit"), "min"),
}
_FACTORIES: Mapping[str, Callable[[tuple[str, ...]], MetricFn]] = {
    "accuracy": lambda labels: accuracy,
    "exact_match": lambda labels: exact_match,
    "f1": lambda labels: _word_f1,
    "f1_macro": _f1_macro,
    "f1_binary": _f1_binary,
    "pearson": lambda labels: _correlation("pearson"),
    "spearman": lambda labels: _correlation("spearman"),
    "rouge": lambda labels: _rouge(*_ROUGE_KINDS),
    "rouge1": lambda labels: _rouge("rouge1"),
    "rouge2": lambda labels: _rouge("rouge2"),
    "rougeL": lambda labels: _rouge("rougeL"),
    "rougeLsum": lambda labels: _rouge("rougeLsum"),
    "bleu": lambda labels: _of_texts("bleu", bleu),
    "trivia_qa": lambda labels: _of_texts("trivia_qa", trivia_qa),
    "coqa_f1": lambda labels: _of_texts("coqa_f1", coqa_f1),
    "edit_distance": lambda labels: _edit_distance,
    INVALID: _invalid,
    LOSS: lambda labels: _no_predictions,
}
