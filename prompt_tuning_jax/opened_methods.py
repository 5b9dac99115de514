"""Methods of any kind opened for use on one frozen model: files, runs and PEFT's adapters."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax import build, run_folder, task_data, tree
from prompt_tuning_jax.checkpoints.peft import is_peft
from prompt_tuning_jax.checkpoints.prompt_file import PromptMetadata, check_model
from prompt_tuning_jax.checkpoints.tuned_file import StoredTuned, is_tuned_file, read_tuned
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.experiment import Experiment
from prompt_tuning_jax.layout import Layout
from prompt_tuning_jax.methods import (
    Attached,
    Context,
    FullTuning,
    Method,
    MultitaskPrompts,
    mask_of,
    peft_prompts,
    peft_weights,
)
from prompt_tuning_jax.models.config import T5Config
from prompt_tuning_jax.models.t5 import T5
from prompt_tuning_jax.overrides import method_from_json, method_to_json
from prompt_tuning_jax.typing import HostArray

_OVER: Mapping[str, Any] = {
    "init": "uniform",
    "init_text": "",
    "init_path": "",
    "init_population": 0,
    "dropout": 0.0,
}


def stored_methods(place: Path, config: T5Config) -> list[tuple[str, StoredTuned]]:
    """What is kept of a method in a file, in all files of a folder, or in a PEFT adapter's folder.

    Nothing for plain prompts, PEFT's own among them, and for what is none of these.  UserError for
    damaged ones, and for an adapter that does not fit a model of this configuration.
    """
    if is_tuned_file(place):
        return [(str(place), read_tuned(place))]
    if not place.is_dir():
        return []
    if is_peft(place):
        return [(str(place), adapter)] if (adapter := peft_adapter(place, config)) else []
    inside = sorted(place.glob("*.safetensors"))
    if not inside or not all(map(is_tuned_file, inside)):
        return []
    return [(str(path), read_tuned(path)) for path in inside]


def peft_adapter(folder: Path, config: T5Config) -> StoredTuned | None:
    """A PEFT adapter of another kind than prompt tuning as what a run keeps; None for a prompt."""
    kind = peft_weights.peft_kind(folder)
    found: peft_weights.PeftWeights | peft_prompts.PeftPrompts
    if kind in peft_weights.KINDS:
        found = peft_weights.read_peft_weights(folder, config)
    elif kind in peft_prompts.KINDS:
        found = peft_prompts.read_peft_prompts(folder, config)
    else:
        return None
    metadata = PromptMetadata(
        model_name=found.base_model_name_or_path, created_by=f"peft {found.peft_version}".rstrip()
    )
    return StoredTuned(tuned=found.tuned, method=method_to_json(found.method), metadata=metadata)


def method_of(stored: StoredTuned, path: str | Path) -> Method:
    """The method that a file's arrays belong to; UserError names the file where it is none."""
    try:
        return method_from_json(stored.method)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def members_of_stored(
    opened: Sequence[tuple[str, StoredTuned]], model: T5, layout: Layout, fingerprint: str
) -> Iterator[tuple[build.Members, tuple[str, ...]]]:
    """Members for those of one method side by side, and the labels that they were trained on."""

    def kind(stored: StoredTuned) -> tuple[Any, ...]:
        return stored.method, stored.tasks, stored.metadata.labels

    for path, stored in opened:
        check_model(stored.metadata, fingerprint=fingerprint, path=path)
    for _, alike in itertools.groupby(opened, key=lambda each: kind(each[1])):
        group = list(alike)
        path, first = group[0]
        method = method_of(first, path)
        tuned = {}
        for name, array in first.tuned.items():
            arrays = [each.tuned.get(name) for _, each in group]
            if any(a is None or a.shape != array.shape for a in arrays):
                raise UserError(f"{path} and the files beside it differ in {name}")
            tuned[name] = np.stack([a for a in arrays if a is not None])
        yield (
            _members(
                method,
                tuned,
                model,
                layout,
                labels=first.metadata.labels,
                tasks=first.tasks,
                of=path,
            ),
            first.metadata.labels,
        )


def members_of_run(run: Experiment, model: T5, folder: Path, layout: Layout) -> build.Members:
    """The best members of a run of any method; UserError where its frozen model is another."""
    tuned, trained_on_model = run_folder.read_best_and_model(folder)
    if not isinstance(run.method, FullTuning):
        trained_on = PromptMetadata(
            model_name=run.model.name_or_path, model_fingerprint=trained_on_model
        )
        check_model(trained_on, fingerprint=build.model_fingerprint(model), path=folder)
    labels = task_data.labels_of(task_data.build_mixture(run.data)) if run.method.ranks else ()
    return _members(
        run.method,
        tuned,
        model,
        layout,
        labels=labels,
        tasks=task_data.trained_tasks(run.data) if isinstance(run.method, MultitaskPrompts) else (),
        of=f"the best checkpoint in {folder}",
    )


def as_trained(method: Method) -> Method:
    """The method without how it began and what only training needs; once trained, these are over.

    What it began from may be gone, and equal structures would differ in it.
    """
    fields: Any = method
    own = {field.name for field in dataclasses.fields(fields)}
    over = {name: value for name, value in _OVER.items() if name in own}
    found: Method = dataclasses.replace(fields, **over)
    return found


def attach_stored(method: Method, model: T5, *, labels: tuple[str, ...], tasks: int) -> Attached:
    """A trained method on the model, before its arrays are put in; UserError where it cannot be."""
    method = as_trained(method)
    context = Context(labels=labels, vocabulary=model.vocabulary, tasks=max(tasks, 1))
    attached = method.attach(model, key=jax.random.key(0), context=context)
    params = tree.split(attached)[1]
    build.require_trainable({name: p for name, p in params.items() if method.trains(name)})
    return attached


def _members(
    method: Method,
    tuned: Mapping[str, HostArray],
    model: T5,
    layout: Layout,
    *,
    labels: tuple[str, ...],
    tasks: tuple[str, ...],
    of: str,
) -> build.Members:
    """The method attached to the model with these arrays, which have a leading axis E."""
    attached = attach_stored(method, model, labels=labels, tasks=len(tasks))
    graphdef, params = tree.split(attached)
    frozen = {name: p for name, p in params.items() if not method.trains(name)}
    own = {name: p for name, p in params.items() if method.trains(name)}
    # Shapes alone: what is tuned has a leading axis E.
    tree.require_same_shapes(
        {name: jax.ShapeDtypeStruct(array.shape[1:], array.dtype) for name, array in tuned.items()},
        own,
        of=of,
        and_of="the model",
    )
    members = build.Members(
        graphdef=graphdef,
        tuned={name: jnp.asarray(array) for name, array in tuned.items()},
        frozen=frozen,
        mask=mask_of(method, list(params)),
        number=len(next(iter(tuned.values()))),
        tasks=tasks,
    )
    return members.sharded(layout, tree.logical_axes(attached))
