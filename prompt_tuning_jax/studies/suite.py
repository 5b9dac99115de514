"""Suites of tasks: an experiment for each task, and a table of the scores.

The table follows table 3 of Lester et al. 2021: for each task and for the suite, the mean score of
several prompts, the best prompt's score and that of their ensemble.
"""

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from prompt_tuning_jax.config.experiment import Data, Experiment
from prompt_tuning_jax.data.tasks.registry import get_mixture, get_task
from prompt_tuning_jax.data.tasks.selection import build_mixture
from prompt_tuning_jax.data.tasks.t5_tasks.metrics import (
    SUPER_GLUE_METRICS,
    super_glue_score,
    super_glue_task_score,
)
from prompt_tuning_jax.data.tasks.t5_tasks.registry import FORMS, Form, form_of, name_in_form
from prompt_tuning_jax.data.tasks.t5_tasks.tables import T5_TASKS
from prompt_tuning_jax.data.tasks.task import Example
from prompt_tuning_jax.errors import UserError, suggest

SEEDS = (0, 1, 2, 3, 4)
COLUMNS = ("majority", "mean", "best", "ensemble")
# Fields set by the task or by other options of the command.
SUITE_FIELDS = (
    "data.task",
    "data.train",
    "data.eval",
    "data.train_split",
    "data.eval_split",
    "data.labels",
    "data.metrics",
    "data.objectives",
    "evaluation.best_by",
)
# Target length of free-text answers; half of it would truncate names in SuperGLUE's answers.
_FREE_TEXT_LENGTH = 32
_NOT_SCORES = ("invalid",)
_TEST = "test"


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A benchmark; ``tasks`` maps short names to tasks or mixtures in their ordinary form."""

    name: str
    title: str
    tasks: Mapping[str, str]


def _glue_name(short: str) -> str:
    return "glue_mnli_and_dev_v002" if short == "mnli" else f"glue_{short}_v002"


def _super_glue_name(short: str) -> str:
    # As in the original, the model generates the referent, and trains on correct referents only.
    wsc = "super_glue_wsc_and_dev_v102_simple"
    return wsc if short == "wsc" else f"super_glue_{short}_v102"


_GLUE = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")
SUITES: Mapping[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite(
            name="super_glue",
            title="SuperGLUE",
            tasks={short: _super_glue_name(short) for short in SUPER_GLUE_METRICS},
        ),
        Suite(name="glue", title="GLUE", tasks={short: _glue_name(short) for short in _GLUE}),
    )
}


def get_suite(name: str) -> Suite:
    """Returns the suite with that name; UserError with the nearest name if it is unknown."""
    if name not in SUITES:
        raise UserError(f"unknown suite {name!r}: {suggest(name, SUITES)}")
    return SUITES[name]


def chosen_tasks(
    suite: Suite, names: Sequence[str], *, form: Form, option: str = "--tasks"
) -> dict[str, str]:
    """Returns {short name: full name} of the chosen tasks, in the suite's order.

    ``names`` are short names, or full names in any form; an empty sequence chooses all tasks.
    ``option`` is the command-line option that error messages mention.  Raises UserError if a task
    is not in the suite or is named twice.
    """
    full_names: dict[str, str] = {}
    by_name = {name: short for short, name in suite.tasks.items()}
    for given in names or suite.tasks:
        own_form, base = form_of(given.removesuffix("_examples"))
        short, full = given, name_in_form(suite.tasks.get(given, ""), form)
        if base in by_name:
            short, full = by_name[base], name_in_form(base, own_form)
        elif given not in suite.tasks:
            raise UserError(
                f"{option}: {suite.name} has no {given!r}: {suggest(given, suite.tasks)}"
            )
        if short in full_names:
            raise UserError(f"{option} names {short} twice: {full_names[short]} and {full}")
        full_names[short] = full
    return {short: full_names[short] for short in suite.tasks if short in full_names}


def require_form(form: str) -> Form:
    """Returns the form with that name; UserError if it is unknown."""
    for known in FORMS:
        if form == known:
            return known
    raise UserError(f"--form: unknown form {form!r}: {suggest(form, FORMS)}")


def without_task(base: Experiment) -> Experiment:
    """Returns ``base`` without its examples and all that only they may have (``SUITE_FIELDS``)."""
    default = Data()
    data = replace(
        base.data,
        task="",
        train="",
        eval="",
        train_split=default.train_split,
        eval_split=default.eval_split,
        labels=(),
        metrics=(),
        objectives=(),
        objective_weights=(),
        probes=(),
    )
    return replace(base, data=data, evaluation=replace(base.evaluation, best_by=""))


def on_task(base: Experiment, name: str, *, workdir: str) -> Experiment:
    """Returns ``base`` on a task or mixture, with the task's own labels, metrics and splits.

    A task without a validation split is evaluated on its test split; see ``data_of``.

    Predictions use the strategy of ``base``.  If the task has no labels to rank, greedy decoding
    replaces ranking, ``data.targets_length`` is at least 32, and a prompt that would be initialized
    from labels is initialized from sampled vocabulary.
    """
    base = without_task(base)
    data, evaluation = replace(base.data, task=name), base.evaluation
    evaluated = get_mixture(name).evaluated_on(data.eval_split)
    if all(data.eval_split not in task.splits and _TEST in task.splits for task in evaluated):
        data = replace(data, eval_split=_TEST)
    if not all(task.labels for task in evaluated):
        data = replace(data, targets_length=max(data.targets_length, _FREE_TEXT_LENGTH))
        if evaluation.strategy in ("rank", "auto"):
            evaluation = replace(evaluation, strategy="greedy")
    training = replace(base.training, workdir=workdir)
    experiment = replace(base, data=data, evaluation=evaluation, training=training)
    mixture = get_mixture(name)
    if any(task.labels for task in (*mixture.tasks, *mixture.evaluated)):
        return experiment
    return _without_label_init(experiment)


def _without_label_init(experiment: Experiment) -> Experiment:
    method, training = experiment.method.without_label_init(), experiment.training
    if not getattr(method, "init_labels", ()):
        inits = ("sampled_vocabulary" if i == "class_labels" else i for i in training.inits)
        training = replace(training, inits=tuple(inits))
    return replace(experiment, method=method, training=training)


def halves(name: str, data_dir: str) -> dict[str, list[Example]]:
    """Splits a task's validation split into ``train`` and ``eval`` halves.

    This helps if there is no training file.  A hash of the passage, or of the whole row, decides
    the half, so no passage is in both.  Raises UserError if the task has no labels, has a metric
    other than accuracy, needs more than its text, or has too few examples.
    """
    task = get_task(name)
    if not task.labels or task.index is not None or [m.name for m in task.metrics] != ["accuracy"]:
        raise UserError(
            f"--split_validation: {name} cannot be halved; only ordinary and taskless tasks with "
            "labels and accuracy as their only metric can"
        )
    split: dict[str, list[Example]] = {"train": [], "eval": []}
    for row in task.source.rows("validation", data_dir):
        about = str(row["passage"]) if "passage" in row else json.dumps(dict(row), default=str)
        odd = hashlib.sha256(about.encode()).digest()[0] % 2
        for example in task.preprocess(row):
            split["train" if odd else "eval"].append(example)
    for half, examples in split.items():
        if not examples:
            raise UserError(
                f"--split_validation: {name} has too few examples: the {half} half is empty"
            )
    return split


def on_files(experiment: Experiment, train: str, eval: str) -> Experiment:
    """Returns the experiment on files of examples of the same task."""
    labels = get_task(experiment.data.task).labels
    data = replace(experiment.data, task="", train=train, eval=eval, labels=labels)
    default = Data()
    data = replace(
        data,
        inputs_column=default.inputs_column,
        targets_column=default.targets_column,
        inputs_template="",
        targets_template="",
    )
    return replace(experiment, data=data)


def data_of(experiment: Experiment, *, training: bool = True) -> dict[str, str]:
    """Returns {``task/split``: fingerprint} of the evaluation data.

    With ``training``, the training data is included.  Raises UserError if data is missing, or if a
    test split has no labels.
    """
    data = experiment.data
    mixture = build_mixture(data)
    if data.eval_split == _TEST:
        for task in mixture.evaluated_on(_TEST):
            if not task.labeled([*islice(task.load(_TEST, data.data_dir), 1)]):
                raise UserError(
                    f"{task.name} has no split to evaluate on: its test split has no labels"
                )
    splits = [(task, data.train_split) for task in mixture.tasks] if training else []
    splits += [(task, data.eval_split) for task in mixture.evaluated_on(data.eval_split)]
    return {f"{t.name}/{split}": t.fingerprint(split, data.data_dir) for t, split in splits}


def official_train_examples(name: str) -> int:
    """Returns the number of training examples in a task's official release, or 0 if unknown."""
    base = T5_TASKS.get(form_of(name)[1])
    mixture = get_mixture(name)
    if base is not None:
        return base.rate
    members = [T5_TASKS.get(form_of(task.name)[1]) for task in mixture.tasks]
    return sum(member.rate for member in members if member)


def metrics_of(suite: Suite, short: str, scores: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the names of the metrics that count for a task of the suite."""
    if suite.name == "super_glue":
        return SUPER_GLUE_METRICS[short]
    return score_names(scores["mean"])


def score_names(scores: Iterable[str]) -> tuple[str, ...]:
    """Returns the names of scores that are metrics; names may have a ``task/`` prefix."""
    return tuple(name for name in scores if name.split("/")[-1] not in _NOT_SCORES)


def suite_scores(suite: Suite, scores: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Returns for each column the mean over tasks of each task's mean over its metrics.

    Over all eight tasks of SuperGLUE this is the leaderboard's score.  A column is None if a task
    lacks a score in it.
    """
    means: dict[str, float | None] = {}
    for column in COLUMNS:
        values = {short: task[column] for short, task in scores.items()}
        wanted = {short: metrics_of(suite, short, task) for short, task in scores.items()}
        if not values or any(
            values[short] is None or not _is_number(values[short].get(metric))
            for short, metrics in wanted.items()
            for metric in metrics
        ):
            means[column] = None
        elif suite.name == "super_glue" and values.keys() == suite.tasks.keys():
            means[column] = super_glue_score(values)
        else:
            shares = [
                super_glue_task_score(short, values[short])
                if suite.name == "super_glue"
                else sum(values[short][name] for name in wanted[short]) / len(wanted[short])
                for short in values
            ]
            means[column] = sum(shares) / len(shares)
    return means


def table(suite: Suite, scores: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns the suite's table as Markdown, with a row per task and the suite's score below."""
    rows = [["task", "metric", *COLUMNS, "cut"]]
    for short, task in scores.items():
        metrics = metrics_of(suite, short, task)
        cells = [_joined((task[column] or {}).get(name) for name in metrics) for column in COLUMNS]
        named = " / ".join(map(_short_metric, metrics))
        rows.append([short, named, *cells, _joined([task.get("cut")])])
    total = suite_scores(suite, scores)
    title = f"{suite.title} score" if scores.keys() == suite.tasks.keys() else "mean of these"
    rows.append([title, "", *(_joined([total[column]]) for column in COLUMNS), ""])
    return markdown_rows(rows)


def coverage(suite: Suite, scores: Mapping[str, Any]) -> str:
    """Says whether the last row is the suite's score, and if not, which tasks are missing."""
    missing = [short for short in suite.tasks if short not in scores]
    if not missing:
        return f"The last row is the {suite.title} score, over all {len(suite.tasks)} tasks."
    return (
        f"The last row is the mean of {len(scores)} of {len(suite.tasks)} tasks and not the "
        f"{suite.title} score; missing: {', '.join(missing)}."
    )


def notes(
    suite: Suite, experiment: Experiment, scores: Mapping[str, Any], halved: Collection[str] = ()
) -> list[str]:
    """Returns notes that explain the table, one per line; ``experiment`` may be any task's."""
    prompts = len(experiment.training.seeds)
    lines = [
        coverage(suite, scores),
        f"Validation split, percent; {experiment.model.name_or_path}, {prompts} prompts a task, "
        f"{experiment.training.steps:,} steps. best: the best prompt on this split. "
        "majority: the most frequent target of the training split. "
        "cut: percentage of the evaluated inputs that were cut to "
        f"{experiment.data.inputs_length} tokens (data.inputs_length).",
    ]
    if most := experiment.data.max_eval_examples:
        lines.append(f"Evaluated on at most {most:,} evenly spaced examples per task.")
    for short, task in scores.items():
        if not task["labels"]:
            lines.append(
                f"{short} has no labels: answers are generated, and prompts start without labels."
            )
        known = official_train_examples(suite.tasks[short])
        number = task["train_examples"]
        if short in halved:
            lines.append(
                f"{short} does NOT use the official splits: trained on half of the validation "
                f"split ({number:,} examples), evaluated on the other half."
            )
        elif known and number != known:
            lines.append(
                f"{short}: trained on {number:,} examples; the official split has {known:,}."
            )
    reports = [line for task in scores.values() for line in task["reports"]]
    return [*lines, *(f"- {line}" for line in reports)]


def as_json(suite: Suite, scores: Mapping[str, Any], *, form: str) -> dict[str, Any]:
    """Returns the table and the scores behind it as JSON values."""
    return {
        "suite": suite.name,
        "form": form,
        "complete": scores.keys() == suite.tasks.keys(),
        "score": suite_scores(suite, scores) if scores else {},
        "tasks": dict(scores),
    }


def markdown_rows(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a Markdown table with aligned columns; the first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


def without_nan(value: Any) -> Any:
    """Returns the value with NaN and infinities replaced by None, as JSON requires."""
    if isinstance(value, Mapping):
        return {str(key): without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _joined(values: Iterable[float | None]) -> str:
    return " / ".join(f"{v:.1f}" if v is not None and _is_number(v) else "-" for v in values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _short_metric(name: str) -> str:
    """Shortens ``taskless_glue_mnli_matched_v002/accuracy`` to ``mnli_matched accuracy``."""
    task, slash, metric = name.rpartition("/")
    base = T5_TASKS.get(form_of(task)[1])
    return f"{base.short if base else task} {metric}" if slash else metric


def say(quiet: bool, *lines: str) -> None:
    """Prints the lines at once, unless ``quiet``."""
    if not quiet:
        for line in lines:
            print(line, flush=True)
