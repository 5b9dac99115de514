"""Opens a folder of prompts, runs and adapters as the tasks to serve."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints import run_folder
from prompt_tuning_jax.checkpoints.array_files import checked_prompt
from prompt_tuning_jax.checkpoints.destination import PROMPT_SUFFIXES
from prompt_tuning_jax.checkpoints.peft.adapter_file import is_peft
from prompt_tuning_jax.checkpoints.prompt_file import (
    PromptMetadata,
    check_model,
    for_task,
    listed,
    load_prompt_with_metadata,
    tasks_of,
)
from prompt_tuning_jax.checkpoints.run_folder import member_names
from prompt_tuning_jax.checkpoints.tuned_checkpoint import TunedCheckpoint, method_of
from prompt_tuning_jax.config.config_file import run_config
from prompt_tuning_jax.config.experiment import Data, Experiment
from prompt_tuning_jax.config.overrides import method_to_json
from prompt_tuning_jax.data.tasks.selection import build_mixture, labels_of
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.loading_methods import attach_stored, known_with, stored_methods
from prompt_tuning_jax.methods import (
    PROMPT,
    MethodConfig,
    MultitaskPrompts,
    PromptTuning,
    TunedModel,
    method_name,
)
from prompt_tuning_jax.methods.base import DECODER_PROMPT
from prompt_tuning_jax.methods.multitask import combined, parts_of
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.serving.tasks import (
    AdapterSpecs,
    PromptValidator,
    Served,
    ServedMethod,
    ServedPrompt,
    ServedTask,
    check_name,
)
from prompt_tuning_jax.storage import natural_order
from prompt_tuning_jax.typing import HostArray

_log = logging.getLogger(__name__)
# A run's folders of prompts, of other methods' arrays, and of fully tuned models.
_RUN_FILES, _RUN_BEST = ("prompts", "tuned"), "checkpoints/best"


@dataclass(frozen=True, kw_only=True)
class TaskSource:
    """The files of a task; ``name`` is empty if the prompts' metadata name the task.

    ``run`` is theirs, for files without metadata.
    """

    name: str
    files: tuple[Path, ...]
    run: Experiment | None = None


@dataclass(frozen=True, kw_only=True)
class LoadedMember:
    """One prompt or method to serve, and its ``task`` if it was trained on a mixture of tasks."""

    served: Served
    task: str = ""


# A file or folder, and the run that it is known to be of -> the trained methods in it; empty for a
# plain prompt.
LoadMethods: TypeAlias = Callable[[Path, Experiment | None], Sequence[LoadedMember]]


def find_tasks(folder: Path) -> list[TaskSource]:
    """Finds the tasks in the folder of a run, or in a folder of files, folders and runs.

    A file contains a prompt or a method's trained arrays; a run without such files is one task.
    """
    if not folder.is_dir():
        raise UserError(f"--prompts {folder}: no such folder")
    if run := _files_of_run(folder):
        return [TaskSource(name="", files=run)]
    sources = []
    for stem, path in sorted(_by_stem(folder).items()):
        if path.is_file() or is_peft(path):
            sources.append(TaskSource(name=stem, files=(path,)))
        elif inside := (_files_of_run(path) or tuple(_by_stem(path, prompts_alone=True).values())):
            sources.append(TaskSource(name=stem, files=inside))
    return sources


def load_tasks(
    source: TaskSource,
    validator: PromptValidator,
    load_methods: LoadMethods = lambda path, run: [],
) -> list[ServedTask]:
    """Loads the task with all its members; a mixture becomes one task NAME.TASK per member task.

    ``load_methods`` loads everything except plain prompts.  Raises UserError for a file that does
    not fit the model.
    """
    members: dict[str, list[Served]] = {}
    for file in source.files:
        loaded = load_methods(file, source.run)
        if not loaded:
            name = file.stem if file.is_file() else file.name
            loaded = [LoadedMember(served=validator.prompt(file, name=name, run=source.run))]
        for one in loaded:
            for member in _by_task(one, source.run):
                members.setdefault(member.task, []).append(member.served)
    tasks = []
    for part, served in members.items():
        known = (one.metadata.task for one in served if one.metadata.task)
        whole = source.name or ("" if part else task_name(next(known, "")))
        name = ".".join(filter(None, (whole, part)))
        if not name:
            raise UserError(
                f"{source.files[0]} does not name its task; move the run into a folder of runs"
            )
        check_name(name, field=f"the task's name of {source.files[0]}")
        tasks.append(validator.task(name, served))
    return tasks


def _by_task(loaded: LoadedMember, run: Experiment | None) -> list[LoadedMember]:
    """Returns a member for each task of the mixture that it was trained on, or the member itself.

    ``run`` fills what its metadata does not say.
    """
    if loaded.task:
        return [loaded]
    about = known_with(run, loaded.served.metadata)
    of_tasks = [
        LoadedMember(
            served=replace(loaded.served, metadata=for_task(about, one)), task=task_name(one.name)
        )
        for one in tasks_of(about)
    ]
    return of_tasks or [LoadedMember(served=replace(loaded.served, metadata=about))]


def for_name(prompt: ServedPrompt, name: str, *, labels: Sequence[str]) -> ServedPrompt:
    """Returns the prompt for the named task; NAME.TASK selects a task of a mixture.

    Raises UserError if the prompt was trained on a mixture and neither the name nor ``labels``
    select a task.
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
        f"the prompt was trained on the tasks {listed([*tasks])}; name one of them, as in "
        f"{name}.{next(iter(tasks))}, or give the labels"
    )


def task_name(trained_on: str) -> str:
    """Returns the task's name, or for a data file its stem.

    If the stem is train, data or the like, the name is that of the folder.
    """
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
    """Returns possible prompts by stem; of files with equal stems, the .safetensors file."""
    paths: dict[str, Path] = {}
    for path in _entries(folder):
        if path.is_file() and path.suffix in PROMPT_SUFFIXES:
            paths[path.stem] = path
        elif path.is_dir() and (not prompts_alone or is_peft(path)):
            paths.setdefault(path.name, path)
    return dict(sorted(paths.items(), key=lambda item: natural_order(item[0])))


def _entries(folder: Path) -> Iterator[Path]:
    entries: Sequence[Path] = sorted(folder.iterdir())
    return (path for path in entries if not path.name.startswith("."))


class MethodLoader:
    """Loads trained arrays of methods, PEFT's adapters, and runs that tuned the whole model.

    A method whose result is a plain prompt is served as one.  Every other method is attached to
    this model.
    """

    def __init__(self, model: Model, validator: PromptValidator) -> None:
        self._model, self._validator = model, validator
        self._specs = AdapterSpecs()
        self._attached: dict[Any, TunedModel] = {}

    def __call__(self, place: Path, run: Experiment | None = None) -> list[LoadedMember]:
        """Loads the members at a path; none for a plain prompt.  UserError if one does not fit.

        ``run`` says whether a prompt limits attention.
        """
        if run_folder.is_run(place):
            return self._whole_models(place)
        members = []
        for path, stored in stored_methods(place, self._model):
            check_model(stored.metadata, fingerprint=self._validator.fingerprint, path=path)
            name = place.stem if place.is_file() else place.name
            members += self._members(name, stored, place)
        return members or self._limited_prompt(place, run)

    def _limited_prompt(self, place: Path, run: Experiment | None) -> list[LoadedMember]:
        """Loads a prompt of a run that limits attention; none for any other prompt."""
        method = None if run is None else run.method.plain_prompt()
        if method is None or not limits_attention(method, causal=self._model.causal):
            return []
        scale = self._model.config.peft_prompt_scale
        prompt_PD, metadata = load_prompt_with_metadata(place, peft_scale=scale)
        check_model(metadata, fingerprint=self._validator.fingerprint, path=place)
        about = known_with(run, metadata)
        return [LoadedMember(served=self._prompt(place.stem, prompt_PD, method, about, place))]

    def _members(self, name: str, stored: TunedCheckpoint, place: Path) -> list[LoadedMember]:
        method, metadata = method_of(stored, place), stored.metadata
        plain = method.plain_prompt()
        # A prompt for images comes with a classifier, as a method's arrays do.
        if plain is not None and not self._model.config.reads_images:
            param_tree.require_same_names(
                stored.trainable, {PROMPT: None}, of=str(place), and_of="a prompt"
            )
            return [
                LoadedMember(
                    served=self._prompt(name, stored.trainable[PROMPT], plain, metadata, place)
                )
            ]
        if not isinstance(method, MultitaskPrompts):
            return [
                LoadedMember(served=self._method(name, method, stored.trainable, metadata, place))
            ]
        # Each task of a mixture has a plain prompt.
        tasks = method.tasks or max(len(stored.tasks), 1)
        self._attach(method, stored.trainable, metadata.labels, tasks, place)
        known = {one.name: one for one in tasks_of(metadata)}
        members = []
        for number in range(tasks):
            task = stored.tasks[number] if number < len(stored.tasks) else str(number)
            array = np.asarray(combined(method.combine, stored.trainable, number))
            about = metadata
            if task in known:
                about = for_task(metadata, known[task])
            elif stored.tasks:
                about = replace(metadata, task=task)
            in_input, in_decoder = parts_of(method, array)
            prompt = self._prompt(name, in_input, method.task_prompt(), about, place, in_decoder)
            part = task_name(task) if tasks > 1 else ""
            members.append(LoadedMember(served=prompt, task=part))
        return members

    def _prompt(
        self,
        name: str,
        array: HostArray,
        method: PromptTuning,
        metadata: PromptMetadata,
        place: Path,
        in_decoder: HostArray | None = None,
    ) -> Served:
        prompt_PD = checked_prompt(array, of=str(place), dtype=np.float32)
        if limits_attention(method, causal=self._model.causal) or in_decoder is not None:
            # Plain prompts share batches, in which all positions attend to all.
            whole, arrays = replace(method, length=len(prompt_PD)), {PROMPT: prompt_PD}
            if in_decoder is not None:
                arrays[DECODER_PROMPT] = checked_prompt(in_decoder, of=str(place), dtype=np.float32)
            return self._method(name, whole, arrays, metadata, place)
        metadata = replace(metadata, combine=metadata.combine or method.placement)
        return self._validator.checked(prompt_PD, metadata, name=name, of=place)

    def _method(
        self,
        name: str,
        method: MethodConfig,
        trainable: Mapping[str, HostArray],
        metadata: PromptMetadata,
        place: Path,
    ) -> ServedMethod:
        attached = self._attach(method, trainable, metadata.labels, 1, place)
        return ServedMethod(
            name=name,
            method=method_name(method),
            trainable=trainable,
            adapter_spec=self._specs.of(attached, trainable),
            metadata=metadata,
        )

    def _attach(
        self,
        method: MethodConfig,
        trainable: Mapping[str, HostArray],
        labels: tuple[str, ...],
        tasks: int,
        place: Path,
    ) -> TunedModel:
        """Attaches equal methods to the model once; UserError if the arrays do not fit."""
        config = method.as_trained()
        needs_labels = method.scores_labels or self._model.config.reads_images
        key = method_to_json(config), labels if needs_labels else (), tasks
        if key not in self._attached:
            shapes = {name: tuple(array.shape) for name, array in trainable.items()}
            attached = attach_stored(
                config, self._model, shapes, labels=labels, tasks=tasks, of=str(place)
            )
            self._attached[key] = attached
        params = param_tree.split(self._attached[key])[1]
        trainable_params = {name: p for name, p in params.items() if method.trains(name)}
        param_tree.require_same_shapes(
            trainable, trainable_params, of=str(place), and_of="the model"
        )
        return self._attached[key]

    def _whole_models(self, folder: Path) -> list[LoadedMember]:
        """Loads the members of a run that tuned all weights, from its checkpoint."""
        run = run_config(str(folder))
        if run is None or not run.method.trains_model:
            name = "" if run is None else f" of {method_name(run.method)}"
            raise UserError(f"{folder}: this run{name} has saved nothing that can be served")
        best = run_folder.read_best(folder)
        labels = _labels_of(run.data, folder)
        metadata = known_with(run, PromptMetadata(model_name=run.model.name_or_path, labels=labels))
        members = []
        for number, name in enumerate(member_names(run)):
            about = replace(metadata, seed=run.training.seeds[number])
            trainable = {path: array[number] for path, array in best.items()}
            member = self._method(name, run.method, trainable, about, folder)
            members.append(LoadedMember(served=member))
        return members


def limits_attention(method: PromptTuning, *, causal: bool) -> bool:
    """Returns whether the prompt or the input attends to less than with a plain prompt."""
    before = causal and method.placement == "prefix"  # the prompt sees no input in any case
    sees_all = method.input_to_prompt and (method.prompt_to_input or before)
    among = method.prompt_to_prompt == "all" or (causal and method.prompt_to_prompt == "causal")
    return not (sees_all and among)


def methods_of(tasks: Sequence[Any]) -> list[ServedMethod]:
    """Returns everything in these tasks except plain prompts."""
    every = (one for task in tasks for one in task.prompts)
    return [one for one in every if isinstance(one, ServedMethod)]


def _labels_of(data: Data, place: Path) -> tuple[str, ...]:
    """Returns the labels of a run's data; none, with a warning, if the data cannot be read."""
    try:
        return labels_of(build_mixture(data))
    except UserError as error:
        _log.warning("%s: its labels are unknown: %s", place, error)
        return ()
