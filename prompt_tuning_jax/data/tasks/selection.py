"""The tasks that an experiment's ``data`` fields name: registered ones, or a user's own files."""

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any

from prompt_tuning_jax.config.experiment import NOT_IMPORTED, Data, Experiment
from prompt_tuning_jax.data.tasks.files import check_file_columns, file_task
from prompt_tuning_jax.data.tasks.metrics import (
    get_metric,
)
from prompt_tuning_jax.data.tasks.task import (
    Mixture,
    Task,
    TrainedTask,
    as_mixture,
    get_mixture,
    tasks_known_as,
)
from prompt_tuning_jax.data.tasks.wording import template_of, template_of_column
from prompt_tuning_jax.errors import UserError

NO_EVAL = "data.eval is empty; name a file of examples to evaluate on (--eval_data)"


def build_mixture(data: Data) -> Mixture:
    """The task or mixture that the data fields name, or the one that a user's own files make."""
    if data.train or data.eval:
        return as_mixture(
            file_task(
                **_file_fields(data),
                targets=data.targets,
                allow_empty_targets=data.allow_empty_targets,
                labels=data.labels,
                metrics=data.metrics,
            )
        )
    if data.module:
        import_module(data.module, task=data.task)
    if data.data_dir and "seqio" in sys.modules:
        from prompt_tuning_jax.data.tasks.seqio_bridge import set_data_dir

        set_data_dir(data.data_dir)
    mixture = get_mixture(data.task)
    if not data.labels and not data.metrics:
        return mixture

    def changed(task: Task) -> Task:
        if data.labels and task.labels and not set(data.labels) & set(task.labels):
            raise UserError(
                f"data.labels is {', '.join(data.labels)} and the labels of {task.name} are "
                f"{', '.join(task.labels)}; leave data.labels empty for the task's own"
            )
        labels = data.labels or task.labels
        metrics = tuple(get_metric(name, labels=labels) for name in data.metrics) or task.metrics
        return dataclasses.replace(task, labels=labels, metrics=metrics)

    return dataclasses.replace(
        mixture,
        tasks=tuple(map(changed, mixture.tasks)),
        evaluated=tuple(map(changed, mixture.evaluated)),
    )


def labels_of(mixture: Mixture) -> tuple[str, ...]:
    """The labels of all its tasks."""
    members = (*mixture.tasks, *mixture.evaluated)
    return tuple(dict.fromkeys(label for task in members for label in task.labels))


def trained_tasks(data: Data) -> tuple[str, ...]:
    """The names of the tasks that are trained on together; none where it is one alone."""
    if data.train or data.eval or data.objectives or not data.task:
        return ()
    names = tuple(task.name for task in build_mixture(data).tasks)
    return names if len(names) > 1 else ()


def inputs_template_of(data: Data) -> str:
    """The template that words the inputs of these data; empty where a task's own code does.

    Of a mixture the one that all its tasks have.
    """
    if data.train or data.eval:
        return data.inputs_template or template_of_column(data.inputs_column)
    templates = {_template_of(task) for task in tasks_known_as(data.task)}
    return templates.pop() if len(templates) == 1 else ""


def mixture_of(data: Data) -> tuple[TrainedTask, ...]:
    """The tasks trained on together, for the metadata of a prompt; none where it is one alone."""
    tasks = () if data.train or data.eval or data.objectives else tasks_known_as(data.task)
    if len(tasks) < 2:
        return ()
    return tuple(
        TrainedTask(
            name=task.name, labels=data.labels or task.labels, inputs_template=_template_of(task)
        )
        for task in tasks
    )


def _template_of(task: Task) -> str:
    return "" if task.from_text is None else template_of(task.from_text)


def import_module(name: str, *, task: str = "") -> None:
    """Imports a module that registers tasks: from the current folder too, if it is nowhere else.

    A module that a run's folder names (``NOT_IMPORTED``) is left alone where ``task`` is known
    without it.  Raises UserError for one that is needed, and for one that cannot be imported.
    """
    if name.startswith(NOT_IMPORTED):
        if not tasks_known_as(task):
            name = name.removeprefix(NOT_IMPORTED)
            raise UserError(
                f"task {task!r} comes from the module {name!r}, which only the run's folder names: "
                f"name it to import it, with --set data.module={name} (from Python: import {name})"
            )
        return
    if not all(part.isidentifier() for part in name.split(".")):
        raise UserError(
            f"data.module is {name!r}; name a module as in an import statement: my_tasks for "
            "my_tasks.py"
        )
    # The installed command does not look in the current folder, unlike python -m.  Last, so that
    # no file there hides a library.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"data.module: cannot import {name!r}: {error}; modules are looked for in the current "
            "folder, beside the config file and where packages are installed"
        ) from None


def check_files(experiment: Experiment) -> None:
    """UserError unless the files that the experiment names are there and hold what is asked for.

    Looks at the first row of data files; cheap, so that it comes before whatever takes long.
    """
    data, method = experiment.data, experiment.method
    inits = experiment.training.inits or (getattr(method, "init", ""),)
    path = getattr(method, "init_path", "")
    if path and {"file", "source"} & set(inits) and not Path(path).expanduser().exists():
        raise UserError(f"method.init_path: cannot read the prompt: {path}: there is no such file")
    if data.objectives:
        return
    if data.train and not data.eval and data.eval_split != data.train_split:
        raise UserError(NO_EVAL)
    if data.train or data.eval:
        check_file_columns(**_file_fields(data))


def _file_fields(data: Data) -> dict[str, Any]:
    """The fields that say where rows are and how they become text."""
    names = ("train", "eval", "train_split", "eval_split", "header", "columns", "separator")
    sides = ("inputs_column", "targets_column", "inputs_template", "targets_template")
    return {name: getattr(data, name) for name in (*names, *sides)}
