"""Writes predictions in the format of the SuperGLUE leaderboard.

Each line is a JSON object {"idx": ..., "label": ...}; MultiRC's are nested like its data.  Labels
are spelled as in jiant 1.3 (``jiant/evaluate.py``), by the benchmark's authors.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prompt_tuning_jax.data.tasks.t5_tasks.official_files import SUPER_GLUE_FOLDERS
from prompt_tuning_jax.data.tasks.t5_tasks.registry import form_of
from prompt_tuning_jax.data.tasks.t5_tasks.tables import SUPER_GLUE, T5_TASKS
from prompt_tuning_jax.data.tasks.task import Example, Task
from prompt_tuning_jax.errors import UserError, suggest

_LOWER_CASE = {"False": "false", "True": "true"}
# The spelling that the server expects; other tasks use their labels unchanged.
_SPELLING: Mapping[str, Mapping[str, Any]] = {
    "boolq": _LOWER_CASE,
    "wic": _LOWER_CASE,
    "copa": {"choice1": 0, "choice2": 1},
    "multirc": {"False": 0, "True": 1},
}


@dataclass(frozen=True, kw_only=True)
class Submission:
    """The ``lines`` of the file that the server expects under the name ``file``.

    ``invalid`` counts predictions that are not labels; they are submitted as the task's first
    label.
    """

    file: str
    lines: tuple[str, ...]
    invalid: int


def submission(task: Task, examples: Sequence[Example], predictions: Sequence[str]) -> Submission:
    """Converts predictions of a SuperGLUE task, which are in the order of the examples.

    If a gap of ReCoRD has several predictions, the first is used.  Raises UserError for tasks
    outside SuperGLUE.
    """
    base = T5_TASKS.get(form_of(task.name)[1])
    if base is None or base.benchmark != "super_glue":
        raise UserError(
            f"{task.name!r} is not a task of SuperGLUE's leaderboard: "
            f"{suggest(task.name, sorted({t.short for t in SUPER_GLUE}))}"
        )
    if base.short == "record":
        rows, invalid = _record(task, examples, predictions), 0
    else:
        labels, invalid = _labels(task, examples, predictions)
        # The task's may have a prefix.
        names = dict(zip(task.labels, base.labels, strict=True)) if base.labels else {}
        labels = [names.get(label, label) for label in labels]
        spelled = [_SPELLING.get(base.short, {}).get(label, label) for label in labels]
        if base.short == "multirc":
            rows = _multirc(examples, spelled)
        else:
            rows = [
                {"idx": example["idx"], "label": label}
                for example, label in zip(examples, spelled, strict=True)
            ]
    return Submission(
        file=f"{SUPER_GLUE_FOLDERS[base.short]}.jsonl",
        lines=tuple(json.dumps(row) for row in rows),
        invalid=invalid,
    )


def _labels(
    task: Task, examples: Sequence[Example], predictions: Sequence[str]
) -> tuple[list[str], int]:
    if task.labels:
        invalid = sum(prediction not in task.labels for prediction in predictions)
        return [p if p in task.labels else task.labels[0] for p in predictions], invalid
    # WSC: the label is whether the text names the span in question.
    assert task.postprocess is not None
    values = [
        task.postprocess(prediction, example, False)
        for prediction, example in zip(predictions, examples, strict=True)
    ]
    return ["True" if value == 1 else "False" for value in values], sum(v == -1 for v in values)


def _multirc(examples: Sequence[Example], labels: Sequence[int]) -> list[dict[str, Any]]:
    passages: dict[int, dict[int, list[dict[str, int]]]] = {}
    for example, label in zip(examples, labels, strict=True):
        questions = passages.setdefault(example["idx/paragraph"], {})
        answers = questions.setdefault(example["idx/question"], [])
        answers.append({"idx": example["idx/answer"], "label": label})
    return [
        {
            "idx": passage,
            "passage": {
                "questions": [{"idx": q, "answers": answers} for q, answers in questions.items()]
            },
        }
        for passage, questions in passages.items()
    ]


def _record(
    task: Task, examples: Sequence[Example], predictions: Sequence[str]
) -> list[dict[str, Any]]:
    assert task.postprocess is not None
    first: dict[int, str] = {}
    for example, prediction in zip(examples, predictions, strict=True):
        answer = task.postprocess(prediction, example, False)["value"]
        first.setdefault(example["idx/query"], answer)
    return [{"idx": query, "label": prediction} for query, prediction in first.items()]
