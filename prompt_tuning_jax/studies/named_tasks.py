"""The tasks of a study that are registered or the user's, and what their tables share."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prompt_tuning_jax.config.experiment import Data, Experiment
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods import method_name
from prompt_tuning_jax.storage import expanded
from prompt_tuning_jax.studies.ablations.axes import Value
from prompt_tuning_jax.studies.suite import on_task, require_form, without_task
from prompt_tuning_jax.studies.transfer import short_of, source_task


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task of the study: its name, the experiment on it, and the data of the reported scores."""

    name: str
    experiment: Experiment
    test: Data | None


def tasks_of(
    base: Experiment, names: Sequence[str], *, form: str, test_split: str, option: str
) -> list[Task]:
    """Returns the tasks that the user names: registered ones, or folders of files.

    A folder has ``train.jsonl``, ``validation.jsonl`` and, for a ``test_split`` of another name,
    that file.  Raises UserError if a task is unknown or named twice, or lacks a file.
    """
    known = require_form(form)
    tasks: list[Task] = []
    for given in names:
        if expanded(given).is_dir():
            task = _of_folder(base, expanded(given), test_split, option=option)
        elif "/" in given:
            raise UserError(f"{option} {given}: no such folder")
        else:
            full = source_task(given, form=known, option=option)
            of = on_task(base, full, workdir="")
            test = dataclasses.replace(of.data, eval_split=test_split) if test_split else None
            task = Task(name=short_of(full), experiment=of, test=test)
        if task.name in [other.name for other in tasks]:
            raise UserError(f"{option} names {task.name} twice")
        tasks.append(task)
    if not tasks:
        raise UserError(f"{option} is empty; name at least one task")
    return tasks


def require_prompts(experiment: Experiment, option: str) -> None:
    """Raises UserError unless the experiment's method is prompt tuning."""
    if method_name(experiment.method) != "prompt_tuning":
        raise UserError(
            f"{option} is about prompts, and the method of the config is "
            f"{type(experiment.method).__name__}; use a config with PromptTuning"
        )


def _of_folder(base: Experiment, folder: Path, test_split: str, *, option: str) -> Task:
    def file(split: str) -> str:
        path = folder / f"{split}.jsonl"
        if not path.is_file():
            raise UserError(f"{option} {folder}: {path.name} is missing; add it to the folder")
        return str(path)

    base = without_task(base)
    data = dataclasses.replace(base.data, train=file("train"), eval=file("validation"))
    test = dataclasses.replace(data, eval=file(test_split)) if test_split else None
    return Task(
        name=folder.resolve().name, experiment=dataclasses.replace(base, data=data), test=test
    )


def majority_note(majority: Mapping[str, float | None]) -> str:
    """Returns a line with the majority class's score of each task."""
    shown = [f"{name} {score:.1f}" for name, score in majority.items() if score is not None]
    return f"The majority class scores: {', '.join(shown) or 'unknown'}."


def unchanged(experiment: Experiment, value: Value) -> Experiment:
    """Returns the experiment itself, for axes that only group results."""
    del value
    return experiment
