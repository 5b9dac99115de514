"""Scores of predictions against targets, in percent, and which of two scores is better.

A prediction outside the label set is wrong, never dropped.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from prompt_tuning_jax.errors import UserError, suggest

# (targets, predictions) -> percent, or several numbers with a name each.
MetricFn: TypeAlias = Callable[[Sequence[Any], Sequence[Any]], float | Mapping[str, float]]
# Whether the largest score is the best, or the smallest.
Direction: TypeAlias = Literal["max", "min"]

# The mean cross entropy per target token on the evaluation set, which is not a metric of
# predictions: whoever evaluates computes it with the model.
LOSS = "loss"
# The percent of predictions that are none of the labels, which every task with labels has.
INVALID = "invalid"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A named score; ``fn`` gets all targets and all predictions of a split, in the same order.

    Where ``fn`` returns several numbers they carry their own names and ``name`` is not used.
    ``direction`` says whether more is better (``max``) or less (``min``): of the number called
    ``name``, or a mapping for several numbers.  Without one it follows from the number's name where
    that is a usual one (``direction_by_name``), and is asked for otherwise.
    """

    name: str
    fn: MetricFn
    direction: Direction | Mapping[str, Direction] | None = None

    def declared_direction(self, name: str) -> Direction | None:
        """What the metric itself says of its number of that name; None where it says nothing."""
        if isinstance(self.direction, Mapping):
            return self.direction.get(name)
        return self.direction if name == self.name else None


def score(
    metrics: Sequence[Metric], targets: Sequence[Any], predictions: Sequence[Any]
) -> dict[str, float]:
    """Compute all metrics -> {name: value}; raises ValueError if the lengths differ or are 0."""
    if len(targets) != len(predictions) or not targets:
        raise ValueError(f"{len(targets)} targets and {len(predictions)} predictions")
    scores: dict[str, float] = {}
    for metric in metrics:
        if metric is EVALUATION_LOSS:
            continue
        value = metric.fn(targets, predictions)
        named = value if isinstance(value, Mapping) else {metric.name: value}
        scores.update({name: float(number) for name, number in named.items()})
    return scores


def is_better(score: float, than: float, direction: Direction) -> bool:
    """Whether a score is better than another one: strictly, and never where it is nan.

    What is not finite is worse than any number.
    """
    if not math.isfinite(score):
        return False
    if not math.isfinite(than):
        return True
    return score > than if direction == "max" else score < than


def best_of(scores: Iterable[float], direction: Direction) -> int:
    """The index of the best score, of equals the first; 0 where none is a number."""
    best, best_score = 0, math.nan
    for index, score in enumerate(scores):
        if is_better(score, best_score, direction):
            best, best_score = index, score
    return best


def direction_by_name(name: str) -> Direction | None:
    """What is better of a metric with a usual name, ``task/`` before it or not; None for others.

    A name whose words speak for both, for instance ``loss_accuracy``, is not a usual one.
    """
    last = name.rsplit("/", maxsplit=1)[-1]
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", last).lower()
    words = {word for part in re.findall(r"[a-z0-9]+", spaced) for word in _stems(part)}
    lower, higher = bool(words & _LOWER_IS_BETTER), bool(words & _HIGHER_IS_BETTER)
    if lower == higher:
        return None
    return "min" if lower else "max"


def _stems(word: str) -> tuple[str, ...]:
    """The word, without the number of ``rouge2``, and without a plural's s."""
    bare = word.rstrip("0123456789")
    return word, bare, word.removesuffix("s")


# The words in metrics' names, as T5, SeqIO, scikit-learn and the papers use them.
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
    """The names that ``get_metric`` knows."""
    return tuple(_FACTORIES)


def get_metric(name: str, *, labels: Sequence[str] = ()) -> Metric:
    """Return a metric by its name, with its direction.

    Args:
      name: one of ``metric_names()``; UserError with the nearest name otherwise.
      labels: the label set, which ``f1_macro`` averages over (default: the targets seen),
        ``f1_binary`` (exactly two: the second is the positive class) and ``invalid`` need;
        UserError where it does not fit.
    """
    if name not in _FACTORIES:
        raise UserError(f"unknown metric {name!r}: {suggest(name, _FACTORIES)}")
    if name == LOSS:
        return EVALUATION_LOSS
    direction: Direction | Mapping[str, Direction] = "min" if name == INVALID else "max"
    if name == "rouge":
        direction = {kind: "max" for kind in _ROUGE_KINDS}
    return Metric(name=name, fn=_FACTORIES[name](tuple(labels)), direction=direction)


def accuracy(targets: Sequence[Any], predictions: Sequence[Any]) -> float:
    """Percent of predictions equal to their target, blanks and case included."""
    hits = sum(bool(t == p) for t, p in zip(targets, predictions, strict=True))
    return 100 * hits / len(targets)


def exact_match(targets: Sequence[str], predictions: Sequence[str]) -> float:
    """Percent of predictions equal to their target after the blanks around both are removed."""
    return accuracy([t.strip() for t in targets], [p.strip() for p in predictions])


def invalid_share(labels: Sequence[str], predictions: Sequence[str]) -> float:
    """Percent of predictions that are none of the labels."""
    known = set(labels)
    return 100 * sum(p not in known for p in predictions) / len(predictions)


def majority_class(targets: Sequence[str]) -> str:
    """The most frequent target; of several equally frequent ones the first in the alphabet."""
    counts = Counter(targets)
    return min(counts, key=lambda target: (-counts[target], target))


def _f1_macro(labels: tuple[str, ...]) -> MetricFn:
    """Mean of the labels' F1; a label that never occurs counts 0, as in T5's CB metric."""

    def f1_macro(targets: Sequence[Any], predictions: Sequence[Any]) -> float:
        from sklearn.metrics import f1_score

        classes = {label: i for i, label in enumerate(labels or sorted(set(targets)))}
        # An invalid prediction is a class of its own: a miss for its target, nobody's false alarm.
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
    """F1 of the second label; an invalid prediction counts as the opposite of its target (T5)."""
    if len(labels) != 2:
        raise UserError(
            f"metric 'f1_binary' needs exactly two labels (the second is the positive class) and "
            f"there are {len(labels)}: set data.labels, or use f1_macro"
        )
    positive = labels[1]

    def f1_binary(targets: Sequence[Any], predictions: Sequence[Any]) -> float:
        from sklearn.metrics import f1_score

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
    """The mean F1 of the words of target and prediction, normalised as for SQuAD."""
    from prompt_tuning_jax.data.tasks.t5_tasks.answers import normalized, word_f1

    _require_texts("f1", targets, predictions)
    pairs = [(normalized(t), normalized(p)) for t, p in zip(targets, predictions, strict=True)]
    # Two texts of articles and punctuation alone have no words to share and yet are the same.
    return 100 * math.fsum(1.0 if t == p else word_f1(t, p) for t, p in pairs) / len(pairs)


def _correlation(name: str) -> MetricFn:
    """Pearson's or Spearman's correlation of numbers written as text; nan for constant ones.

    A prediction that is not a number counts as the target that is farthest from its own.
    """

    def correlation(targets: Sequence[str], predictions: Sequence[str]) -> float:
        from prompt_tuning_jax.data.tasks.t5_tasks import metrics as of_t5

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
        for own, prediction in zip(truth, predictions, strict=True):
            guess = _finite(prediction)
            guesses.append((low if own - low > high - own else high) if guess is None else guess)
        return (
            of_t5.pearson(truth, guesses) if name == "pearson" else of_t5.spearman(truth, guesses)
        )

    return correlation


def _require_texts(name: str, *compared: Sequence[Any]) -> None:
    """UserError where a task's own postprocessing leaves something else than text to compare."""
    for value in (value for values in compared for value in values):
        if not isinstance(value, str):
            raise UserError(
                f"metric {name!r} compares texts, and this task compares values of type "
                f"{type(value).__name__}; leave data.metrics empty for the task's own"
            )


def _finite(text: Any) -> float | None:
    try:
        number = float(text)
    except (ValueError, TypeError):
        return None
    return number if math.isfinite(number) else None


def _rouge(*kinds: str) -> MetricFn:
    """The mean F1 of these kinds of ROUGE, as for T5's tasks; one number, or one by each name."""

    def rouge(targets: Sequence[str], predictions: Sequence[str]) -> float | dict[str, float]:
        from prompt_tuning_jax.data.tasks.t5_tasks.metrics import rouge_f1

        _require_texts(kinds[0], targets, predictions)
        scores = rouge_f1(targets, predictions, kinds=kinds)
        return scores if len(kinds) > 1 else scores[kinds[0]]

    return rouge


def _no_predictions(targets: Sequence[Any], predictions: Sequence[Any]) -> float:
    raise TypeError("the loss is no metric of predictions")


EVALUATION_LOSS = Metric(name=LOSS, fn=_no_predictions, direction="min")

_ROUGE_KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
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
    INVALID: _invalid,
    LOSS: lambda labels: _no_predictions,
}
