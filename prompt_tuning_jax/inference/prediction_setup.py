"""Resolves the wording, labels and task of predictions from the prompts and the arguments."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prompt_tuning_jax.checkpoints.prompt_file import (
    PromptMetadata,
    for_task,
    generates_text,
    listed,
    shared_labels,
    tasks_of,
)
from prompt_tuning_jax.config.experiment import Data, Experiment
from prompt_tuning_jax.data.tasks.registry import get_task, tasks_known_as
from prompt_tuning_jax.data.tasks.selection import build_mixture
from prompt_tuning_jax.data.tasks.task import Task, TrainedTask
from prompt_tuning_jax.data.tasks.wording import (
    AS_IT_IS,
    Wording,
    shared_wording,
    template_of,
    template_of_column,
    wording_of,
)
from prompt_tuning_jax.distributed.sharding import Partitioner
from prompt_tuning_jax.errors import UserError, suggest
from prompt_tuning_jax.inference.loading import LoadedPrompts


@dataclass(frozen=True, kw_only=True)
class PredictionSetup:
    """The experiment, the loaded prompts, and the resolved wording, labels and task."""

    experiment: Experiment
    loaded: LoadedPrompts
    partitioner: Partitioner
    wording: Wording
    labels: tuple[str, ...]
    task: str  # which task of the mixture that the prompts were trained on


def resolve(
    experiment: Experiment,
    loaded: LoadedPrompts,
    partitioner: Partitioner,
    *,
    labels: tuple[str, ...],
    task: str,
    raw: bool,
) -> PredictionSetup:
    """Resolves wording, labels and task from the prompts' metadata and the arguments.

    Raises UserError if the prompts disagree, or if nothing determines the labels to rank.
    """
    data = experiment.data
    known = loaded.by_name()
    mixtures = {name: tasks for name, one in known.items() if (tasks := tasks_of(one))}
    named = task or data.task
    chosen = ""
    if mixtures:
        of_tasks = any(members.tasks for members in loaded.groups)
        indifferent = bool(labels) and raw and not of_tasks
        for name, tasks in mixtures.items():
            one = _select_task(tasks, named, name, must_exist=bool(task), indifferent=indifferent)
            if one is not None:
                known[name], chosen = for_task(known[name], one), one.name
    elif task:
        one = _trained_task(get_task(task))
        known = {name: for_task(about, one) for name, about in known.items()}
    candidates = labels
    if not candidates:
        by_name = {name: about.labels for name, about in known.items()}
        candidates = shared_labels(
            by_name, instead="give the labels that all are to choose between"
        )
        if data.labels and not chosen and not task:
            candidates = data.labels
    if any(about.normalize_length for about in known.values()):
        evaluation = dataclasses.replace(experiment.evaluation, normalize_length=True)
        experiment = dataclasses.replace(experiment, evaluation=evaluation)
    strategy = experiment.evaluation.strategy
    is_text = bool(known) and all(map(generates_text, known.values())) and not task
    if not candidates and strategy in ("rank", "auto") and not chosen and not is_text:
        candidates = _labels_of(data)
    if not candidates and strategy == "rank":
        raise UserError("no labels are known to rank; give them with labels (data.labels=a,b)")
    return PredictionSetup(
        experiment=experiment,
        loaded=loaded,
        partitioner=partitioner,
        wording=AS_IT_IS if raw else _wording(data, known, named),
        labels=candidates,
        task=chosen,
    )


def _select_task(
    tasks: Sequence[TrainedTask], named: str, prompt: str, *, must_exist: bool, indifferent: bool
) -> TrainedTask | None:
    """Returns the task that ``named`` selects.

    If there is none, returns None if ``indifferent`` is set and ``must_exist`` is not; otherwise
    raises UserError.
    """
    names = [one.name for one in tasks]
    also = [one.name for one in tasks_known_as(named)] if named else []
    for one in tasks:
        if one.name == named or also == [one.name]:
            return one
    if must_exist:
        raise UserError(f"{prompt} was not trained on the task {named!r}; {suggest(named, names)}")
    if indifferent:
        return None
    raise UserError(
        f"{prompt} was trained on {len(names)} tasks: say with --task (task=) which one the inputs "
        f"are of: {listed(names)}"
    )


def _trained_task(task: Task) -> TrainedTask:
    template = "" if task.from_text is None else template_of(task.from_text)
    return TrainedTask(name=task.name, labels=task.labels, inputs_template=template)


def _labels_of(data: Data) -> tuple[str, ...]:
    """Returns the labels of the config's data; raises UserError if they cannot be determined."""
    if not (data.task or data.train or data.eval) or (data.eval and not data.train):
        return data.labels
    try:
        mixture = build_mixture(data)
    except UserError as error:
        raise UserError(
            f"nothing says which labels to choose between: give them with labels "
            f"(--set data.labels=a,b); {error}"
        ) from None
    if len(mixture.tasks) > 1:
        names = listed([task.name for task in mixture.tasks])
        raise UserError(
            f"{mixture.name} has {len(mixture.tasks)} tasks: name one with --task: {names}"
        )
    return mixture.tasks[0].labels


def _wording(data: Data, known: Mapping[str, PromptMetadata], named: str) -> Wording:
    """Returns the wording of the inputs: the config's template, or else the prompts' wording.

    Falls back to the wording of the config's data or of the named task.  Raises UserError if the
    prompts were trained with different wordings.
    """
    wordings = {
        name: wording_of(one.task, one.inputs_template, chat=one.chat)
        for name, one in known.items()
    }
    if template := data.inputs_template:
        wordings = {
            name: dataclasses.replace(one, template=template, from_text=None)
            for name, one in wordings.items()
        }
    try:
        shared = shared_wording(wordings)
    except UserError as error:
        hint = "predict with one after the other, or give whole inputs and raw"
        raise UserError(f"{error}; {hint}") from None
    chat = shared.chat or data.chat
    if shared != AS_IT_IS:
        return dataclasses.replace(shared, chat=chat)
    if data.train or data.eval:
        return Wording(template=template_of_column(data.inputs_column), chat=chat)
    return wording_of(named, "", chat=chat)
