"""Tasks: where rows come from, how a row becomes text, and how predictions are scored."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from prompt_tuning_jax.data.tasks.code_digest import code_digest
from prompt_tuning_jax.data.tasks.metric_functions import normalized
from prompt_tuning_jax.data.tasks.metrics import (
    INVALID,
    LOSS,
    Direction,
    Metric,
    invalid_share,
    majority_class,
    score,
)
from prompt_tuning_jax.data.tasks.text_metrics import AUC_NAMES
from prompt_tuning_jax.errors import UserError, suggest

# Precedes the names of scores of the choices with the largest mean log-probability.
NORMED = "normed_"
# A row of a source, by column.
Row: TypeAlias = Mapping[str, Any]
# {"inputs": str, "targets": str} and any further fields (JSON values) that metrics need.
Example: TypeAlias = dict[str, Any]
# A pure function from a row to any number of examples.
Preprocess: TypeAlias = Callable[[Row], Sequence[Example]]
# (text, example, is_target) -> what the metrics compare; called on targets and on predictions.
Postprocess: TypeAlias = Callable[[str, Example, bool], Any]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Rows by split.

    Attributes:
      splits: the names of the splits.
      rows: ``(split, data_dir)`` -> rows, always in the same order.
      fingerprint: ``(split, data_dir)`` -> a string that changes when the rows do.
      note: ``(split, data_dir)`` -> what readers of scores on these rows must know, or "".
      display_names: of splits in messages; the default is TASK/SPLIT.
    """

    splits: tuple[str, ...]
    rows: Callable[[str, str], Iterable[Row]]
    fingerprint: Callable[[str, str], str]
    note: Callable[[str, str], str] = lambda split, data_dir: ""
    display_names: Mapping[str, str] = field(default_factory=dict)


def row_is_example(row: Row) -> Sequence[Example]:
    """Returns the preprocessor of a source whose rows are examples already."""
    return [dict(row)]


def _is_json(value: Any) -> bool:
    if value is None or isinstance(value, str | int | float):
        return True
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class Task:
    """A source, a preprocessor, and how predictions are scored.

    Attributes:
      name: unique among the registered tasks.
      source: where the rows come from.
      preprocess: row -> examples, pure.
      labels: the strings that a classifier chooses between; empty for free text.  The second of
        two is the positive class.
      metrics: the first selects the best checkpoint.
      postprocess: applied to each target and each prediction before the metrics; None for none.
      from_text: a bare text, as a user types it, -> inputs; None if they are the same.
      inputs_ending: the text with which every input ends, such as a question; a model without an
        end of sequence in its inputs would lose it to truncation.
      index: if not None, a token for this number precedes the inputs' ids (``task_index_id``).
      description: one line.
      notes: decisions about the data to report, one line each.
      version: change it when ``preprocess`` or the source's ``rows`` yield something else, so that
        cached examples are rebuilt.  Empty: a digest of their code takes its place, which changes
        when the modules that define them are edited (``code_digest``).
      ranks: predictions are the labels with the largest log-probability, whatever
        ``evaluation.strategy`` is.  The scores of two labels then include ``auc-roc`` and
        ``auc-pr`` of the second, in percent.
      normalize_length: with ``ranks``, compare the mean log-probabilities of the labels' tokens.
      has_label: example -> whether it can be scored; None for all examples.
      choices_field: the field of the examples with the texts that each chooses between, if they
        have no common labels.  They are ranked, whatever ``evaluation.strategy`` is, and scores
        by their mean log-probabilities are added with the prefix ``NORMED``.
    """

    name: str
    source: Source
    preprocess: Preprocess = row_is_example
    labels: tuple[str, ...] = ()
    metrics: tuple[Metric, ...] = ()
    postprocess: Postprocess | None = None
    from_text: Callable[[str], str] | None = None
    inputs_ending: str = ""
    index: int | None = None
    description: str = ""
    notes: tuple[str, ...] = ()
    version: str = ""
    ranks: bool = False
    normalize_length: bool = False
    has_label: Callable[[Example], bool] | None = None
    choices_field: str = ""

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits."""
        return self.source.splits

    def load(self, split: str, data_dir: str = "") -> Iterator[Example]:
        """Yields the examples of a split, always in the same order; UserError if there is none."""
        self._check_split(split)
        number = 0
        for row in self.source.rows(split, data_dir):
            for example in self.preprocess(row):
                for key in ("inputs", "targets"):
                    if not isinstance(example.get(key), str):
                        raise UserError(
                            f"task {self.name!r}, split {split!r}, example {number}: {key!r} "
                            f"must be text, not {type(example.get(key)).__name__}"
                        )
                for key, value in example.items():
                    if not _is_json(value):
                        raise UserError(
                            f"task {self.name!r}, split {split!r}, example {number}: {key!r} has "
                            f"a value of type {type(value).__name__}, which is not JSON; make it "
                            "a text, a number, a list or a dict of these"
                        )
                yield example
                number += 1

    def fingerprint(self, split: str, data_dir: str = "") -> str:
        """Returns a string that changes with the split's examples: their rows, version or code."""
        self._check_split(split)
        code = self.version or [code_digest(self.source.rows), code_digest(self.preprocess)]
        parts = [self.name, split, self.source.fingerprint(split, data_dir), code]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def labeled(self, examples: Sequence[Example]) -> list[int]:
        """Returns the numbers of the examples that can be scored."""
        can_be_scored = self.has_label
        if can_be_scored is None:
            return list(range(len(examples)))
        return [number for number, example in enumerate(examples) if can_be_scored(example)]

    def score(self, examples: Sequence[Example], predictions: Sequence[str]) -> dict[str, float]:
        """Scores predicted texts, one per example in the same order -> {metric name: value}.

        If the task has labels, adds ``invalid``: the percent of predictions that are not labels.
        """
        scores = score(
            self.metrics,
            [self._compared(e["targets"], e, True) for e in examples],
            [self._compared(p, e, False) for p, e in zip(predictions, examples, strict=True)],
        )
        if self.labels:
            scores[INVALID] = invalid_share(self.labels, predictions)
        return scores

    def ranking_scores(self, scores: Iterable[str]) -> tuple[str, ...]:
        """Returns the names of the scores that ranking adds to these of the metrics."""
        if self.choices_field:
            return tuple(f"{NORMED}{name}" for name in scores)
        return AUC_NAMES if self.ranks and len(self.labels) == 2 else ()

    def declared_direction(self, metric: str) -> Direction | None:
        """Returns the direction of a score (max or min) if a metric declares it; otherwise None."""
        if self.choices_field:
            metric = metric.removeprefix(NORMED)
        for one in self.metrics:
            if (direction := one.declared_direction(metric)) is not None:
                return direction
        return "min" if metric in (INVALID, LOSS) else None

    def is_correct(self, example: Example, prediction: str) -> bool:
        """Returns whether a prediction equals its target as the metrics compare them."""
        target = self._compared(example["targets"], example, True)
        return matches(target, self._compared(prediction, example, False))

    def group_of(self, example: Example) -> str | None:
        """Returns what the examples that a metric scores together share; None for one by itself.

        It is the ``group`` of a postprocessed target, as in T5's MultiRC and ReCoRD.
        """
        target = self._compared(example["targets"], example, True)
        return repr(target["group"]) if isinstance(target, Mapping) and "group" in target else None

    def majority_scores(
        self, examples: Sequence[Example], train_targets: Sequence[str]
    ) -> dict[str, float]:
        """Returns the scores of always predicting the training split's most frequent target."""
        return self.score(examples, [majority_class(train_targets)] * len(examples))

    def _compared(self, text: str, example: Example, is_target: bool) -> Any:
        return text if self.postprocess is None else self.postprocess(text, example, is_target)

    def _check_split(self, split: str) -> None:
        if split not in self.splits:
            raise UserError(
                f"task {self.name!r} has no split {split!r}: {suggest(split, self.splits)}"
            )


def same_value(a: Any, b: Any) -> bool:
    """Returns equality of two results of a postprocessor, which may be arrays."""
    equal = a == b
    return bool(equal.all()) if hasattr(equal, "all") else bool(equal)


def matches(target: Any, prediction: Any) -> bool:
    """Returns equality of a postprocessor's results for a target and a prediction, in T5's forms.

    A mapping of a target may have more keys than that of a prediction, such as ``group``.  A list
    holds all right answers to a question, which are compared as by SQuAD's exact match.
    """
    if isinstance(target, Mapping) and isinstance(prediction, Mapping):
        return all(key in target and matches(target[key], prediction[key]) for key in prediction)
    if isinstance(target, list | tuple) and isinstance(prediction, str):
        return normalized(prediction) in {normalized(str(answer)) for answer in target}
    return same_value(target, prediction)


def with_targets_prefix(task: Task, prefix: str) -> Task:
    """Returns the task with a text before its targets, labels and choices.

    Its metrics do not see the text.
    """

    def changed(example: Example, change: Callable[[str], str]) -> Example:
        choices = example.get(task.choices_field)
        own = {task.choices_field: [*map(change, choices)]} if isinstance(choices, list) else {}
        return {**example, **own, "targets": change(example["targets"])}

    def preprocess(row: Row) -> Sequence[Example]:
        return [changed(each, lambda text: f"{prefix}{text}") for each in task.preprocess(row)]

    def postprocess(text: str, example: Example, is_target: bool) -> Any:
        start = prefix.strip()
        bare = text.removeprefix(start).strip() if text.startswith(start) else text
        plain = changed(example, lambda text: text.removeprefix(prefix))
        return bare if task.postprocess is None else task.postprocess(bare, plain, is_target)

    # The closures have no code of their own that says what they wrap.
    version = task.version or [code_digest(task.source.rows), code_digest(task.preprocess)]
    return dataclasses.replace(
        task,
        preprocess=preprocess,
        postprocess=postprocess,
        labels=tuple(f"{prefix}{label}" for label in task.labels),
        version=json.dumps([version, prefix]),
    )


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Several tasks trained on together; each is evaluated on its own.

    Attributes:
      tasks: its members.
      rates: of drawing an example of each, relative to the others; positive.
      evaluated: further tasks, which are only evaluated.
    """

    name: str
    tasks: tuple[Task, ...]
    rates: tuple[float, ...]
    evaluated: tuple[Task, ...] = ()
    description: str = ""

    def __post_init__(self) -> None:
        if not self.tasks or len(self.tasks) != len(self.rates):
            raise UserError(
                f"mixture {self.name!r} has {len(self.tasks)} tasks and {len(self.rates)} rates"
            )
        for task, rate in zip(self.tasks, self.rates, strict=True):
            if not 0 < rate < float("inf"):
                raise UserError(
                    f"mixture {self.name!r}: the rate of {task.name!r} is {rate}; it must be "
                    "positive (leave the task out, or list it in `evaluated`)"
                )

    def evaluated_on(self, split: str) -> tuple[Task, ...]:
        """Returns the tasks with that split.

        If none has it, returns the trained ones, which raise the error.
        """
        having = tuple(t for t in (*self.tasks, *self.evaluated) if split in t.splits)
        return having or self.tasks


def as_mixture(task: Task) -> Mixture:
    """Returns a mixture of one."""
    return Mixture(name=task.name, tasks=(task,), rates=(1.0,), description=task.description)


def task_index_id(vocabulary_size: int, index: int) -> int:
    """Returns the token id of task number ``index``: the last id for 0, then downwards.

    With T5's vocabulary of 32,100 these are ``<extra_id_0>``, ``<extra_id_1>`` and so on.
    """
    return vocabulary_size - (index + 1)


@dataclass(frozen=True, kw_only=True)
class TrainedTask:
    """One task of a mixture: its labels, and the template of its inputs."""

    name: str
    labels: tuple[str, ...] = ()
    inputs_template: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.labels)})" if self.labels else self.name
