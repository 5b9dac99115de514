"""The tasks that an experiment's ``data`` fields select: registered ones, or a user's files."""

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any

from prompt_tuning_jax.config.experiment import NOT_IMPORTED, Data, Experiment
from prompt_tuning_jax.config.methods import split_init
from prompt_tuning_jax.data.images.sources import is_image_source
from prompt_tuning_jax.data.images.task import image_task
from prompt_tuning_jax.data.tasks.files import check_file_columns, file_task
from prompt_tuning_jax.data.tasks.metrics import get_metric
from prompt_tuning_jax.data.tasks.registry import get_mixture, tasks_known_as
from prompt_tuning_jax.data.tasks.task import (
    Mixture,
    Task,
    TrainedTask,
    as_mixture,
    with_targets_prefix,
)
from prompt_tuning_jax.data.tasks.wording import template_of, template_of_column
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.storage import expanded

NO_EVAL = "data.eval is empty; set it to a file of evaluation examples (--eval_data)"


def build_mixture(data: Data) -> Mixture:
    """Returns the named task or mixture, or the task of a user's files."""
    prefix = data.targets_prefix
    if not prefix:
        return _build_mixture(data)
    # Labels that come from the metadata of a prompt have the prefix.
    bare = tuple(label.removeprefix(prefix) for label in data.labels)
    mixture = _build_mixture(dataclasses.replace(data, labels=bare))

    def prefixed(task: Task) -> Task:
        return with_targets_prefix(task, prefix)

    return dataclasses.replace(
        mixture,
        tasks=tuple(map(prefixed, mixture.tasks)),
        evaluated=tuple(map(prefixed, mixture.evaluated)),
    )


def use_data_dir(data_dir: str) -> None:
    """Lets SeqIO's tasks look for data of TensorFlow Datasets in this folder, if it is named."""
    if data_dir and "seqio" in sys.modules:
        from prompt_tuning_jax.data.tasks.from_seqio import set_data_dir

        set_data_dir(data_dir)


def _build_mixture(data: Data) -> Mixture:
    if is_image_data(data):
        return as_mixture(
            image_task(**_image_fields(data), labels=data.labels, metrics=data.metrics)
        )
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
    use_data_dir(data.data_dir)
    mixture = get_mixture(data.task)
    if not data.labels and not data.metrics:
        return mixture

    def changed(task: Task) -> Task:
        if data.labels and task.labels and not set(data.labels) & set(task.labels):
            raise UserError(
                f"data.labels is {', '.join(data.labels)}, but the labels of {task.name} are "
                f"{', '.join(task.labels)}; leave data.labels empty for these"
            )
        labels = data.labels or task.labels
        if not data.metrics:
            return dataclasses.replace(task, labels=labels)
        metrics = tuple(get_metric(name, labels=labels) for name in data.metrics)
        # These compare labels as text, where a task's own may compare their numbers.
        postprocess = None if labels else task.postprocess
        return dataclasses.replace(task, labels=labels, metrics=metrics, postprocess=postprocess)

    return dataclasses.replace(
        mixture,
        tasks=tuple(map(changed, mixture.tasks)),
        evaluated=tuple(map(changed, mixture.evaluated)),
    )


def is_image_data(data: Data) -> bool:
    """Returns whether the examples are images of a user."""
    return not data.objectives and any(map(is_image_source, (data.train, data.eval)))


def labels_of(mixture: Mixture) -> tuple[str, ...]:
    """Returns the labels of all tasks of a mixture."""
    members = (*mixture.tasks, *mixture.evaluated)
    return tuple(dict.fromkeys(label for task in members for label in task.labels))


def trained_tasks(data: Data) -> tuple[str, ...]:
    """Returns the names of the tasks that are trained on together; empty for a single task."""
    if data.train or data.eval or data.objectives or not data.task:
        return ()
    names = tuple(task.name for task in build_mixture(data).tasks)
    return names if len(names) > 1 else ()


def inputs_template_of(data: Data) -> str:
    """Returns the template of the inputs; empty if the code of a task words them.

    For a mixture, the template that all its tasks share.
    """
    if is_image_data(data):
        return ""
    if data.train or data.eval:
        return data.inputs_template or template_of_column(data.inputs_column)
    templates = {_template_of(task) for task in tasks_known_as(data.task)}
    return templates.pop() if len(templates) == 1 else ""


def mixture_of(data: Data) -> tuple[TrainedTask, ...]:
    """Returns the tasks that are trained on together, for a prompt's metadata.

    Returns () for a single task.
    """
    tasks = () if data.train or data.eval or data.objectives else tasks_known_as(data.task)
    if len(tasks) < 2:
        return ()
    prefix = data.targets_prefix

    def labels_in(task: Task) -> tuple[str, ...]:
        bare = (label.removeprefix(prefix) for label in data.labels or task.labels)
        return tuple(f"{prefix}{label}" for label in bare)

    return tuple(
        TrainedTask(name=task.name, labels=labels_in(task), inputs_template=_template_of(task))
        for task in tasks
    )


def _template_of(task: Task) -> str:
    return "" if task.from_text is None else template_of(task.from_text)


def import_module(name: str, *, task: str = "") -> None:
    """Imports a module that registers tasks, from the current folder if it is not installed.

    A module that a run's folder names (``NOT_IMPORTED``) is not imported: UserError asks for it if
    ``task`` is not known without it.  Also raises UserError if the import fails.
    """
    if name.startswith(NOT_IMPORTED):
        if not tasks_known_as(task):
            name = name.removeprefix(NOT_IMPORTED)
            raise UserError(
                f"task {task!r} is defined in the module {name!r}, which only the run's folder "
                f"names; import it with --set data.module={name} (from Python: import {name})"
            )
        return
    if not all(part.isidentifier() for part in name.split(".")):
        raise UserError(
            f"data.module is {name!r}; write a module as in an import statement: my_tasks for "
            "my_tasks.py"
        )
    # Unlike python -m, the installed command does not search the current folder.  It is searched
    # last, so that no file there shadows a library.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"data.module: cannot import {name!r}: {error}; modules are searched in the current "
            "folder, beside the config file and among installed packages"
        ) from None


def check_files(experiment: Experiment) -> None:
    """Raises UserError unless the files of the experiment exist and have the required columns.

    Only reads the first row of data files, so that it can run before slow steps.
    """
    data, method = experiment.data, experiment.method
    inits = experiment.training.inits or (getattr(method, "init", ""),)
    path = getattr(method, "init_path", "")
    if path and {"file", "source"} & set(inits) and not expanded(path).exists():
        raise UserError(f"method.init_path: cannot read the prompt: {path}: no such file")
    for entry in inits:
        _, path = split_init(entry)
        if path and not expanded(path).exists():
            raise UserError(f"training.inits: cannot read the prompt: {path}: no such file")
    if data.objectives:
        return
    if data.train and not data.eval and data.eval_split != data.train_split:
        raise UserError(NO_EVAL)
    if is_image_data(data):
        for path in filter(None, (data.train, data.eval)):
            if not expanded(path).exists():
                raise UserError(f"{path}: no such file or folder")
    elif data.train or data.eval:
        check_file_columns(**_file_fields(data))


def _image_fields(data: Data) -> dict[str, Any]:
    """Returns the fields for the sets of images."""
    return {name: getattr(data, name) for name in ("train", "eval", "train_split", "eval_split")}


def _file_fields(data: Data) -> dict[str, Any]:
    """Returns the fields for the files of rows and their columns."""
    names = ("train", "eval", "train_split", "eval_split", "header", "columns", "separator")
    sides = ("inputs_column", "targets_column", "inputs_template", "targets_template")
    return {name: getattr(data, name) for name in (*names, *sides)}
