"""Opens trained methods for use on one frozen model: files, runs and PEFT adapters."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints import run_folder
from prompt_tuning_jax.checkpoints.location import is_address
from prompt_tuning_jax.checkpoints.peft import prompts, weights
from prompt_tuning_jax.checkpoints.peft.adapter_file import (
    CONFIG,
    is_peft,
    read_config,
    require_task,
)
from prompt_tuning_jax.checkpoints.peft.modules import task_type
from prompt_tuning_jax.checkpoints.peft.saved import Parameter
from prompt_tuning_jax.checkpoints.prompt_file import PromptMetadata, check_model
from prompt_tuning_jax.checkpoints.run_folder import member_names
from prompt_tuning_jax.checkpoints.tuned_checkpoint import (
    TunedCheckpoint,
    is_tuned_file,
    method_of,
    read_tuned,
    require_sizes,
)
from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.config.overrides import method_to_json
from prompt_tuning_jax.data.tasks.selection import (
    build_mixture,
    inputs_template_of,
    labels_of,
    mixture_of,
    trained_tasks,
)
from prompt_tuning_jax.distributed.sharding import Partitioner
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.setup import Members, model_fingerprint, require_trainable
from prompt_tuning_jax.inference.t5x_methods import t5x_method
from prompt_tuning_jax.methods import (
    Context,
    MethodConfig,
    TunedModel,
    attach_method,
    trainable_mask,
)
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.models.config import ModelConfig
from prompt_tuning_jax.typing import HostArray


def stored_methods(source: str | Path, model: Model) -> list[tuple[str, TunedCheckpoint]]:
    """Returns (path, checkpoint) for each method stored at ``source``.

    ``source`` is a file, a folder that contains only such files, a PEFT adapter's folder, or a T5X
    checkpoint, which may be at a ``gs://`` or ``s3://`` address.  The list is empty for anything
    else and for plain prompts, including PEFT's and T5X's.  Raises UserError for a damaged file,
    and for arrays that do not fit the model.
    """
    config = model.config
    if (of_t5x := t5x_method(source, config)) is not None:
        return [(str(source), of_t5x)]
    if is_address(str(source)):
        return []
    place = Path(source)
    if is_tuned_file(place):
        return [(str(place), read_tuned(place, config))]
    if not place.is_dir():
        return []
    if is_peft(place):
        adapter = peft_adapter(place, config, own=param_tree.split(model)[1])
        return [(str(place), adapter)] if adapter else []
    inside = sorted(place.glob("*.safetensors"))
    if not inside or not all(map(is_tuned_file, inside)):
        return []
    return [(str(path), read_tuned(path, config)) for path in inside]


def peft_adapter(
    folder: Path, config: ModelConfig, *, own: Mapping[str, Parameter] | None = None
) -> TunedCheckpoint | None:
    """Reads a PEFT adapter as a run's checkpoint; returns None for a prompt tuning adapter.

    ``own`` are the model's parameters by path; any of them in the adapter must be equal.  Raises
    UserError for an adapter of another kind of model.
    """
    kind = weights.peft_kind(folder)
    adapter: weights.PeftWeights | prompts.PeftPrompts
    if kind in weights.TYPES:
        adapter = weights.read_peft_weights(folder, config, own)
    elif kind in prompts.TYPES:
        adapter = prompts.read_peft_prompts(folder, config)
    else:
        require_task(read_config(folder / CONFIG), task_type(config), folder / CONFIG)
        return None
    metadata = PromptMetadata(
        model_name=adapter.base_model_name_or_path,
        created_by=f"peft {adapter.peft_version}".rstrip(),
    )
    return TunedCheckpoint(
        trainable=adapter.trainable, method=method_to_json(adapter.method), metadata=metadata
    )


def members_of_stored(
    checkpoints: Sequence[tuple[str, TunedCheckpoint]],
    model: Model,
    partitioner: Partitioner,
    fingerprint: str,
) -> Iterator[Members]:
    """Yields the members for each group of consecutive checkpoints of one method.

    Tasks and labels must be the same within a group too.
    """

    def kind(stored: TunedCheckpoint) -> tuple[Any, ...]:
        return stored.method, stored.tasks, stored.metadata.labels

    for path, stored in checkpoints:
        check_model(stored.metadata, fingerprint=fingerprint, path=path)
    for _, grouped in itertools.groupby(checkpoints, key=lambda each: kind(each[1])):
        group = list(grouped)
        path, first = group[0]
        method = method_of(first, path)
        trainable = {}
        for name, array in first.trainable.items():
            arrays = [each.trainable.get(name) for _, each in group]
            if any(a is None or a.shape != array.shape for a in arrays):
                raise UserError(f"{path} and the files beside it differ in {name}")
            trainable[name] = np.stack([a for a in arrays if a is not None])
        yield _members(
            method,
            trainable,
            model,
            partitioner,
            labels=first.metadata.labels,
            tasks=first.tasks,
            of=path,
        )


def members_of_run(
    run: Experiment, model: Model, folder: Path, partitioner: Partitioner
) -> tuple[Members, list[PromptMetadata]]:
    """Returns the best members of a run of any method, and the metadata of each.

    Raises UserError if the run has a different frozen model.
    """
    trainable, trained_on_model = run_folder.read_best_and_model(folder)
    if not run.method.trains_model:
        trained_on = PromptMetadata(
            model_name=run.model.name_or_path, model_fingerprint=trained_on_model
        )
        check_model(trained_on, fingerprint=model_fingerprint(model), path=folder)
    known = [_known_of_run(run, model, folder, name) for name in member_names(run)]
    needs_labels = run.method.scores_labels or model.config.reads_images
    members = _members(
        run.method,
        trainable,
        model,
        partitioner,
        labels=known[0].labels if needs_labels else (),
        tasks=trained_tasks(run.data) if run.method.has_tasks else (),
        of=f"the best checkpoint in {folder}",
    )
    return members, known


def _known_of_run(run: Experiment, model: Model, folder: Path, name: str) -> PromptMetadata:
    """Returns the metadata of a member's file, or of the run's config if there is no file."""
    file = folder / run_folder.TUNED / f"{name}.safetensors"
    if is_tuned_file(file):
        return known_with(run, read_tuned(file, model.config).metadata)
    try:
        labels = labels_of(build_mixture(run.data))
    except UserError:  # the files with the labels are gone
        if run.method.scores_labels or model.config.reads_images:
            raise
        labels = ()
    return known_with(run, PromptMetadata(labels=labels))


def known_with(run: Experiment | None, metadata: PromptMetadata) -> PromptMetadata:
    """Fills empty fields of the metadata from the run's config."""
    if run is None:
        return metadata
    prompt = run.method.plain_prompt()
    return dataclasses.replace(
        metadata,
        task=metadata.task or run.data.train or run.data.task,
        inputs_template=metadata.inputs_template or inputs_template_of(run.data),
        chat=metadata.chat or run.data.chat,
        normalize_length=metadata.normalize_length or run.evaluation.normalize_length,
        mixture=metadata.mixture or mixture_of(run.data),
        combine=metadata.combine or ("" if prompt is None else prompt.placement),
    )


def attach_stored(
    method: MethodConfig,
    model: Model,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    labels: tuple[str, ...],
    tasks: int,
    of: str,
) -> TunedModel:
    """Attaches a trained method to the model, without its stored arrays, which have ``shapes``.

    Raises UserError if the method cannot be attached, or if the arrays of ``of`` are not the ones
    that it tunes.  Nothing is allocated before these checks.
    """
    method = method.as_trained()
    context = Context(labels=labels, vocabulary=model.vocabulary, num_tasks=max(tasks, 1))

    def attach() -> TunedModel:
        return attach_method(model, method, key=jax.random.key(0), context=context)

    try:
        require_sizes(method, shapes)
        abstract = jax.eval_shape(lambda: param_tree.split(attach())[1])
        trainable_params = {name: p for name, p in abstract.items() if method.trains(name)}
        require_trainable(trainable_params)
    except UserError as error:
        raise UserError(f"{of}: {error}") from None
    # Only the shapes of the stored arrays.
    stored = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    param_tree.require_same_shapes(stored, trainable_params, of=of, and_of="the model")
    return attach()


def _members(
    method: MethodConfig,
    trainable: Mapping[str, HostArray],
    model: Model,
    partitioner: Partitioner,
    *,
    labels: tuple[str, ...],
    tasks: tuple[str, ...],
    of: str,
) -> Members:
    """Attaches the method to the model with these arrays, which have a leading axis E."""
    # What is tuned has a leading axis E.
    shapes = {name: tuple(array.shape[1:]) for name, array in trainable.items()}
    attached = attach_stored(method, model, shapes, labels=labels, tasks=len(tasks), of=of)
    graphdef, params = param_tree.split(attached)
    frozen = {name: p for name, p in params.items() if not method.trains(name)}
    members = Members(
        graphdef=graphdef,
        trainable={name: jnp.asarray(array) for name, array in trainable.items()},
        frozen=frozen,
        mask=trainable_mask(method, list(params)),
        number=len(next(iter(trainable.values()))),
        tasks=tasks,
    )
    return members.sharded(partitioner, param_tree.logical_axes(attached))
