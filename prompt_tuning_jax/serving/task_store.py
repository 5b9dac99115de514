"""A folder of prompts and runs as tasks."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from prompt_tuning_jax.checkpoints.destination import PROMPT_SUFFIXES
from prompt_tuning_jax.checkpoints.peft.adapter_file import is_peft
from prompt_tuning_jax.checkpoints.prompt_file import for_task, listed, tasks_of
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.serving.tasks import (
    PromptValidator,
    Served,
    ServedPrompt,
    ServedTask,
    check_name,
    natural,
)

# Where a run keeps its prompts, what other methods tuned, and where it tuned all, that.
_RUN_FILES, _RUN_BEST = ("prompts", "tuned"), "checkpoints/best"


@dataclass(frozen=True, kw_only=True)
class TaskSource:
    """A task in a folder; ``name`` is empty where the prompts themselves say what they are for.

    ``placement`` and ``inputs_template`` are the run's, for files that do not say it themselves.
    """

    name: str
    files: tuple[Path, ...]
    placement: str = ""
    inputs_template: str = ""


@dataclass(frozen=True, kw_only=True)
class LoadedMember:
    """Something to serve; of a mixture of tasks the ``task`` that it is for."""

    served: Served
    task: str = ""


# A file or folder -> all that is kept of methods there; nothing for a plain prompt.
MethodsIn: TypeAlias = Callable[[Path], Sequence[LoadedMember]]


def find_tasks(folder: Path) -> list[TaskSource]:
    """The tasks of a run's folder, or of a folder of files, folders of files and runs.

    A file is a prompt's or of tuned arrays; a run that kept none stands for itself.
    """
    if not folder.is_dir():
        raise UserError(f"--prompts {folder}: no such folder")
    if run := _files_of_run(folder):
        return [TaskSource(name="", files=run)]
    found = []
    for stem, path in sorted(_by_stem(folder).items()):
        if path.is_file() or is_peft(path):
            found.append(TaskSource(name=stem, files=(path,)))
        elif inside := (_files_of_run(path) or tuple(_by_stem(path, prompts_alone=True).values())):
            found.append(TaskSource(name=stem, files=inside))
    return found


def load_found(
    found: TaskSource, validator: PromptValidator, methods_in: MethodsIn = lambda place: []
) -> list[ServedTask]:
    """The task with all that votes in it, or for a mixture of tasks each of them as NAME.TASK.

    ``methods_in`` opens what is no plain prompt.  UserError for the first that does not fit.
    """
    members: dict[str, list[Served]] = {}
    for file in found.files:
        opened = methods_in(file)
        if not opened:
            name = file.stem if file.is_file() else file.name
            prompt = validator.prompt(file, name=name, placement=found.placement)
            opened = [LoadedMember(served=prompt)]
        for one in opened:
            for own in _by_task(one, found.inputs_template):
                members.setdefault(own.task, []).append(own.served)
    tasks = []
    for part, served in members.items():
        known = (one.metadata.task for one in served if one.metadata.task)
        whole = found.name or ("" if part else task_name(next(known, "")))
        name = ".".join(filter(None, (whole, part)))
        if not name:
            raise UserError(
                f"{found.files[0]} does not say its task; put the run into a folder of runs"
            )
        check_name(name, field=f"the task's name of {found.files[0]}")
        tasks.append(validator.task(name, served))
    return tasks


def _by_task(opened: LoadedMember, inputs_template: str) -> list[LoadedMember]:
    """What was trained on a mixture once for each of its tasks; all else alone.

    ``inputs_template`` is the run's, for files that do not say theirs.
    """
    served = opened.served
    about = served.metadata
    if not opened.task and (tasks := tasks_of(about)):
        return [
            LoadedMember(
                served=replace(served, metadata=for_task(about, one)), task=task_name(one.name)
            )
            for one in tasks
        ]
    if about.inputs_template or not inputs_template:
        return [opened]
    about = replace(about, inputs_template=inputs_template)
    return [replace(opened, served=replace(served, metadata=about))]


def for_name(prompt: ServedPrompt, name: str, *, labels: Sequence[str]) -> ServedPrompt:
    """The prompt of a task of this name; of a mixture the part that NAME.TASK names.

    UserError where it was trained on several tasks, none of which is named, and no labels say what
    it is to choose between.
    """
    tasks = {task_name(one.name): one for one in tasks_of(prompt.metadata)}
    if not tasks:
        return prompt
    for part, one in tasks.items():
        if name == part or name.endswith(f".{part}"):
            return replace(prompt, metadata=for_task(prompt.metadata, one))
    if labels:
        return prompt
    raise UserError(
        f"the prompt was trained on the tasks {listed([*tasks])}: name the one that is meant, as "
        f"{name}.{next(iter(tasks))}, or give the labels"
    )


def task_name(trained_on: str) -> str:
    """A task's name as it is; for a file its stem, or its folder's name where that is train."""
    path = Path(trained_on)
    if len(path.parts) < 2 and not path.suffix:
        return trained_on
    named = path.parent.name if path.stem in ("train", "data", "examples") else path.stem
    return named or path.stem


def _files_of_run(folder: Path) -> tuple[Path, ...]:
    if not (folder / "experiment.json").is_file():
        return ()
    for inside in (folder / name for name in _RUN_FILES):
        if inside.is_dir() and (files := _by_stem(inside, prompts_alone=True)):
            return tuple(files.values())
    return (folder,) if (folder / _RUN_BEST).is_dir() else ()


def _by_stem(folder: Path, *, prompts_alone: bool = False) -> dict[str, Path]:
    """What may be prompts: of files that differ in their suffix alone the safetensors."""
    found: dict[str, Path] = {}
    for path in _entries(folder):
        if path.is_file() and path.suffix in PROMPT_SUFFIXES:
            found[path.stem] = path
        elif path.is_dir() and (not prompts_alone or is_peft(path)):
            found.setdefault(path.name, path)
    return dict(sorted(found.items(), key=lambda item: natural(item[0])))


def _entries(folder: Path) -> Iterator[Path]:
    entries: Sequence[Path] = sorted(folder.iterdir())
    return (path for path in entries if not path.name.startswith("."))
