"""What a folder keeps of methods, opened to be served beside plain prompts."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints import run_folder
from prompt_tuning_jax.checkpoints.array_files import checked_prompt
from prompt_tuning_jax.checkpoints.prompt_file import (
    PromptMetadata,
    check_model,
    for_task,
    tasks_of,
)
from prompt_tuning_jax.checkpoints.run_folder import (
    member_names,
)
from prompt_tuning_jax.checkpoints.tuned_checkpoint import TunedCheckpoint
from prompt_tuning_jax.config.config_file import run_config
from prompt_tuning_jax.config.experiment import Data
from prompt_tuning_jax.config.overrides import method_to_json
from prompt_tuning_jax.data.tasks.selection import (
    build_mixture,
    inputs_template_of,
    labels_of,
    mixture_of,
)
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.loading_methods import (
    attach_stored,
    method_of,
    stored_methods,
)
from prompt_tuning_jax.methods import (
    PROMPT,
    FullTuning,
    MethodConfig,
    MultitaskPrompts,
    PromptTuning,
    TunedModel,
    method_name,
)
from prompt_tuning_jax.methods.multitask import combined
from prompt_tuning_jax.models.t5.model import T5
from prompt_tuning_jax.serving.adapter_spec import ServedMethod, Structures
from prompt_tuning_jax.serving.task_store import LoadedMember, task_name
from prompt_tuning_jax.serving.tasks import PromptValidator, Served
from prompt_tuning_jax.typing import HostArray

_log = logging.getLogger(__name__)


class MethodsIn:
    """Opens files of tuned arrays, PEFT's adapters and runs that tuned all of their model.

    What comes down to a plain prompt is one; all else keeps its method, attached to this model.
    """

    def __init__(self, model: T5, validator: PromptValidator) -> None:
        self._model, self._fits = model, validator
        self._structures = Structures()
        self._attached: dict[Any, TunedModel] = {}

    def __call__(self, place: Path) -> list[LoadedMember]:
        """Nothing for a plain prompt; UserError for what does not fit, or cannot be served."""
        if run_folder.is_run(place):
            return self._whole_models(place)
        found = []
        for path, stored in stored_methods(place, self._model):
            check_model(stored.metadata, fingerprint=self._fits.fingerprint, path=path)
            name = place.stem if place.is_file() else place.name
            found += self._opened(name, stored, place)
        return found

    def _opened(self, name: str, stored: TunedCheckpoint, place: Path) -> list[LoadedMember]:
        method, metadata = method_of(stored, place), stored.metadata
        if isinstance(method, PromptTuning):
            param_tree.require_same_names(
                stored.trainable, {PROMPT: None}, of=str(place), and_of="a prompt"
            )
            return [
                LoadedMember(
                    served=self._prompt(name, stored.trainable[PROMPT], method, metadata, place)
                )
            ]
        if not isinstance(method, MultitaskPrompts):
            return [
                LoadedMember(served=self._method(name, method, stored.trainable, metadata, place))
            ]
        # A task's prompt is a plain one, and no row needs another's.
        tasks = method.tasks or max(len(stored.tasks), 1)
        self._attach(method, stored.trainable, metadata.labels, tasks, place)
        known = {one.name: one for one in tasks_of(metadata)}
        found = []
        for number in range(tasks):
            task = stored.tasks[number] if number < len(stored.tasks) else str(number)
            array = np.asarray(combined(method.combine, stored.trainable, number))
            about = metadata
            if task in known:
                about = for_task(metadata, known[task])
            elif stored.tasks:
                about = dataclasses.replace(metadata, task=task)
            prompt = self._fits.checked(array, about, name=name, of=place)
            part = task_name(task) if tasks > 1 else ""
            found.append(LoadedMember(served=prompt, task=part))
        return found

    def _prompt(
        self,
        name: str,
        array: HostArray,
        method: PromptTuning,
        metadata: PromptMetadata,
        place: Path,
    ) -> Served:
        require_sees_all(method, place)
        prompt_PD = checked_prompt(array, of=str(place), dtype=np.float32)
        return self._fits.checked(
            prompt_PD, metadata, name=name, placement=method.placement, of=place
        )

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
            adapter_spec=self._structures.of(attached, trainable),
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
        """The method attached to the model, once for all alike; UserError where it does not fit."""
        alike = method.as_trained()
        key = method_to_json(alike), labels if method.scores_labels else (), tasks
        if key not in self._attached:
            shapes = {name: tuple(array.shape) for name, array in trainable.items()}
            attached = attach_stored(
                alike, self._model, shapes, labels=labels, tasks=tasks, of=str(place)
            )
            self._attached[key] = attached
        params = param_tree.split(self._attached[key])[1]
        own = {name: p for name, p in params.items() if method.trains(name)}
        param_tree.require_same_shapes(trainable, own, of=str(place), and_of="the model")
        return self._attached[key]

    def _whole_models(self, folder: Path) -> list[LoadedMember]:
        """The members of a run that tuned all weights, which keeps no file of them."""
        run = run_config(str(folder))
        if run is None or not isinstance(run.method, FullTuning):
            name = "" if run is None else f" of {method_name(run.method)}"
            raise UserError(f"{folder}: this run{name} keeps nothing that can be served")
        best = run_folder.read_best(folder)
        metadata = PromptMetadata(
            model_name=run.model.name_or_path,
            task=run.data.train or run.data.task,
            labels=_labels_of(run.data, folder),
            inputs_template=inputs_template_of(run.data),
            mixture=mixture_of(run.data),
        )
        found = []
        for number, name in enumerate(member_names(run)):
            about = dataclasses.replace(metadata, seed=run.training.seeds[number])
            trainable = {path: array[number] for path, array in best.items()}
            member = self._method(name, run.method, trainable, about, folder)
            found.append(LoadedMember(served=member))
        return found


def require_sees_all(method: PromptTuning, place: Path) -> None:
    """UserError for a prompt that not all may look at."""
    sees_all = method.prompt_to_input and method.input_to_prompt
    if not sees_all or method.prompt_to_prompt != "all":
        raise UserError(
            f"{place}: its run limits who sees the prompt (method.prompt_to_input and the like), "
            "which is not served"
        )


def methods_of(tasks: Sequence[Any]) -> list[ServedMethod]:
    """All in these tasks that are no plain prompts."""
    every = (one for task in tasks for one in task.prompts)
    return [one for one in every if isinstance(one, ServedMethod)]


def _labels_of(data: Data, place: Path) -> tuple[str, ...]:
    """Nothing, and a note, where the files or the module that would say them are not there."""
    try:
        return labels_of(build_mixture(data))
    except UserError as error:
        _log.warning("%s: its labels are unknown: %s", place, error)
        return ()
