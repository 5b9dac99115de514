"""A task: where its rows come from, how a row becomes text, and how predictions are scored."""

import difflib
import functools
import hashlib
import importlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from prompt_tuning_jax.data.tasks.code_identity import code_identity
from prompt_tuning_jax.data.tasks.metrics import (
    INVALID,
    LOSS,
    Direction,
    Metric,
    invalid_share,
    majority_class,
    score,
)
from prompt_tuning_jax.errors import UserError, suggest

# A row as its source holds it; its columns are the source's own.
Row: TypeAlias = Mapping[str, Any]
# {"inputs": str, "targets": str} and any further fields (JSON values) that metrics need.
Example: TypeAlias = dict[str, Any]
# A pure function: one row gives no, one or several examples.
Preprocess: TypeAlias = Callable[[Row], Sequence[Example]]
# (text, example, is_target) -> what the metrics compare; called on targets and on predictions.
Postprocess: TypeAlias = Callable[[str, Example, bool], Any]

# Each of these modules has a tuple TASKS, and may have ALIASES (name -> name); they are imported
# when a task is first asked for.
_BUILTIN_MODULES = (
    "prompt_tuning_jax.data.tasks.word_valence",
    "prompt_tuning_jax.data.tasks.t5_tasks.registry",
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Rows by split.

    Attributes:
      splits: the names of the splits.
      rows: ``(split, data_dir)`` -> rows, always in the same order.
      fingerprint: ``(split, data_dir)`` -> a string that changes when the rows do.
      titles: what to call a split, by its name; TASK/SPLIT where it is not here.
      remark: ``(split, data_dir)`` -> what readers of scores on these rows must know, or "".
    """

    splits: tuple[str, ...]
    rows: Callable[[str, str], Iterable[Row]]
    fingerprint: Callable[[str, str], str]
    note: Callable[[str, str], str] = lambda split, data_dir: ""
    display_names: Mapping[str, str] = field(default_factory=dict)


def row_is_example(row: Row) -> Sequence[Example]:
    """The preprocessor of a source whose rows are examples already."""
    return [dict(row)]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A source, a preprocessor, and how predictions are scored.

    Attributes:
      name: unique among the registered tasks.
      source: where the rows come from.
      preprocess: row -> examples, pure.
      labels: the strings a classifier chooses between; empty for free text.  The second of two
        is the positive class.
      metrics: the first is the one that the best checkpoint is chosen by.
      postprocess: applied to each target and each prediction before the metrics; None: as it is.
      from_text: a bare text, as a user types it, -> inputs; None where they are the same.
      index: where not None, one token for this number stands before the inputs' ids
        (``t5_tasks.forms.task_index_id``).
      description: one line.
      notes: what was decided about the data, a line each.
    """

    name: str
    source: Source
    preprocess: Preprocess = row_is_example
    labels: tuple[str, ...] = ()
    metrics: tuple[Metric, ...] = ()
    postprocess: Postprocess | None = None
    from_text: Callable[[str], str] | None = None
    index: int | None = None
    description: str = ""
    notes: tuple[str, ...] = ()

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits."""
        return self.source.splits

    def load(self, split: str, data_dir: str = "") -> Iterator[Example]:
        """Yield the examples of a split, always in the same order; UserError for a bad split."""
        self._check_split(split)
        number = 0
        for row in self.source.rows(split, data_dir):
            for example in self.preprocess(row):
                for key in ("inputs", "targets"):
                    if not isinstance(example.get(key), str):
                        raise UserError(
                            f"task {self.name!r}, split {split!r}, example {number}: {key!r} must "
                            f"be text and is {type(example.get(key)).__name__}"
                        )
                yield example
                number += 1

    def fingerprint(self, split: str, data_dir: str = "") -> str:
        """A string that changes when the examples of the split do: rows or preprocessor."""
        self._check_split(split)
        parts = [
            self.source.fingerprint(split, data_dir),
            code_identity(self.source.rows),
            code_identity(self.preprocess),
        ]
        return hashlib.sha256(json.dumps([self.name, split, *parts]).encode()).hexdigest()

    def score(self, examples: Sequence[Example], predictions: Sequence[str]) -> dict[str, float]:
        """Score predicted texts, one per example in the same order -> {metric name: value}.

        Where the task has labels, ``invalid`` is added: the percent of predictions that are none.
        """
        scores = score(
            self.metrics,
            [self._compared(e["targets"], e, True) for e in examples],
            [self._compared(p, e, False) for p, e in zip(predictions, examples, strict=True)],
        )
        if self.labels:
            scores[INVALID] = invalid_share(self.labels, predictions)
        return scores

    def declared_direction(self, metric: str) -> Direction | None:
        """Whether more or less of a number in its scores is better, where that was declared."""
        for one in self.metrics:
            if (direction := one.declared_direction(metric)) is not None:
                return direction
        return "min" if metric in (INVALID, LOSS) else None

    def is_correct(self, example: Example, prediction: str) -> bool:
        """Whether a prediction is what its target says, as the metrics compare them."""
        target = self._compared(example["targets"], example, True)
        return bool(target == self._compared(prediction, example, False))

    def majority_scores(
        self, examples: Sequence[Example], train_targets: Sequence[str]
    ) -> dict[str, float]:
        """What always answering the training split's most frequent target scores."""
        return self.score(examples, [majority_class(train_targets)] * len(examples))

    def _compared(self, text: str, example: Example, is_target: bool) -> Any:
        return text if self.postprocess is None else self.postprocess(text, example, is_target)

    def _check_split(self, split: str) -> None:
        if split not in self.splits:
            raise UserError(
                f"task {self.name!r} has no split {split!r}: {suggest(split, self.splits)}"
            )


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Several tasks trained on together; each is evaluated on its own.

    Attributes:
      tasks: its members.
      rates: how often an example of each is drawn, relative to the others; positive.
      evaluated: further tasks, which are evaluated and never trained on.
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
                    f"mixture {self.name!r}: the rate of {task.name!r} is {rate} and must be "
                    "positive; leave the task out, or name it in `evaluated`"
                )

    def evaluated_on(self, split: str) -> tuple[Task, ...]:
        """The tasks that have that split; all trained ones where none has, for their message."""
        having = tuple(t for t in (*self.tasks, *self.evaluated) if split in t.splits)
        return having or self.tasks


_registered: dict[str, Task | Mixture] = {}


def register(task: Task | Mixture, *, replace: bool = False) -> None:
    """Make a task or mixture known by its name; UserError if the name is taken."""
    if not replace and task.name in _known():
        raise UserError(f"task {task.name!r} is registered already; choose another name")
    _registered[task.name] = task


def task_names() -> tuple[str, ...]:
    """The names of this library's tasks and of the registered ones, sorted, without aliases.

    SeqIO's are among them once a module that registers some has been imported.
    """
    return tuple(sorted({*_known(), *_seqio_names()}))


def alias_names() -> tuple[str, ...]:
    """Further names of this library's tasks and mixtures, sorted."""
    return tuple(sorted(_aliases()))


def builtin_names() -> tuple[str, ...]:
    """The names of this library's own tasks and mixtures, sorted."""
    return tuple(sorted(_builtin()))


def get_mixture(name: str) -> Mixture:
    """Return the mixture of that name, or the task of that name as a mixture of one.

    Looks at this library's tasks, then at the registered ones, then at SeqIO's.  UserError with
    the nearest name for an unknown one.
    """
    known = _known()
    found = known.get(name) or known.get(_aliases().get(name, ""))
    if found is None and name in _seqio_names():
        from prompt_tuning_jax.data.tasks.seqio_bridge import from_seqio

        found = from_seqio(name)
    if found is None:
        names = task_names()
        # The part of a name that people remember, such as rte, is not near any in spelling.
        likely = [known_name for known_name in names if name and name in known_name]
        likely = likely or difflib.get_close_matches(name, [*names, *_aliases()], n=4)
        raise UserError(
            f"unknown task {name!r}: {suggest(name, likely or names)} (`prompt-tuning tasks` lists "
            "all; import the module that registers a task of your own or of SeqIO first)"
        )
    return found if isinstance(found, Mixture) else as_mixture(found)


def tasks_known_as(name: str) -> tuple[Task, ...]:
    """The task of this name or alias, or the trained members of the mixture; none if unknown.

    Nothing is imported for it: not the module that would register a task, and not SeqIO.  SeqIO's
    own are found where somebody has imported it.
    """
    known = _known()
    found = known.get(name) or known.get(_aliases().get(name, ""))
    if found is None and name in _seqio_names():
        found = get_mixture(name)
    if isinstance(found, Mixture):
        return found.tasks
    return () if found is None else (found,)


def get_task(name: str) -> Task:
    """Return the one task of that name; UserError for an unknown one and for a mixture."""
    mixture = get_mixture(name)
    members = (*mixture.tasks, *mixture.evaluated)
    if len(members) > 1 or members[0].name != mixture.name:
        listed = ", ".join(task.name for task in members)
        raise UserError(f"{name!r} is a mixture; name one of its tasks: {listed}")
    return mixture.tasks[0]


def as_mixture(task: Task) -> Mixture:
    """A mixture of one."""
    return Mixture(name=task.name, tasks=(task,), rates=(1.0,), description=task.description)


@functools.cache
def _builtin() -> Mapping[str, Task | Mixture]:
    modules = [importlib.import_module(name) for name in _BUILTIN_MODULES]
    return {task.name: task for module in modules for task in module.TASKS}


@functools.cache
def _aliases() -> Mapping[str, str]:
    modules = [importlib.import_module(name) for name in _BUILTIN_MODULES]
    return {a: n for module in modules for a, n in getattr(module, "ALIASES", {}).items()}


def _known() -> dict[str, Task | Mixture]:
    return {**_builtin(), **_registered}


def _seqio_names() -> tuple[str, ...]:
    # Whoever registered a SeqIO task imported SeqIO for it, so that looking costs no import of
    # TensorFlow where nobody did.
    if "seqio" not in sys.modules:
        return ()
    from prompt_tuning_jax.data.tasks.seqio_bridge import seqio_names

    return seqio_names()


@dataclass(frozen=True, kw_only=True)
class TrainedTask:
    """One of the tasks of a mixture: its labels, and the template of its inputs."""

    name: str
    labels: tuple[str, ...] = ()
    inputs_template: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.labels)})" if self.labels else self.name
