"""Scores of predictions against targets, in percent.

A prediction outside the label set is wrong, never dropped.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from prompt_tuning_jax.data.suggest import suggest
from prompt_tuning_jax.errors import UserError

# (targets, predictions) -> percent, or several numbers with a name each.
MetricFn: TypeAlias = Callable[[Sequence[Any], Sequence[Any]], float | Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A named score; ``fn`` gets all targets and all predictions of a split, in the same order.

    Where ``fn`` returns several numbers they carry their own names and ``name`` is not used.
    """

    name: str
    fn: MetricFn


def score(
    metrics: Sequence[Metric], targets: Sequence[Any], predictions: Sequence[Any]
) -> dict[str, float]:
    """Compute all metrics -> {name: value}; raises ValueError if the lengths differ or are 0."""
    if len(targets) != len(predictions) or not targets:
        raise ValueError(f"{len(targets)} targets and {len(predictions)} predictions")
    scores: dict[str, float] = {}
    for metric in metrics:
        value = metric.fn(targets, predictions)
        named = value if isinstance(value, Mapping) else {metric.name: value}
        scores.update({name: float(number) for name, number in named.items()})
    return scores


def metric_names() -> tuple[str, ...]:
    """The names that ``get_metric`` knows."""
    return tuple(_FACTORIES)


def get_metric(name: str, *, labels: Sequence[str] = ()) -> Metric:
    """Return a metric by its name.

    Args:
      name: one of ``metric_names()``; UserError with the nearest name otherwise.
      labels: the label set, which ``f1_macro`` averages over (default: the targets seen),
        ``f1_binary`` (exactly two: the second is the positive class) and ``invalid`` need;
        UserError where it does not fit.
    """
    if name not in _FACTORIES:
        raise UserError(f"unknown metric {name!r}: {suggest(name, _FACTORIES)}")
    return Metric(name=name, fn=_FACTORIES[name](tuple(labels)))


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


_FACTORIES: Mapping[str, Callable[[tuple[str, ...]], MetricFn]] = {
    "accuracy": lambda labels: accuracy,
    "exact_match": lambda labels: exact_match,
    "f1_macro": _f1_macro,
    "f1_binary": _f1_binary,
    "invalid": _invalid,
}
