"""Prompts and runs opened for use on one frozen model."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax import build, run_folder, tree
from prompt_tuning_jax.checkpoints.convert_prompt import prompt_files
from prompt_tuning_jax.checkpoints.peft import is_peft
from prompt_tuning_jax.checkpoints.prompt_file import (
    check_fits,
    check_model,
    load_prompt_with_metadata,
)
from prompt_tuning_jax.checkpoints.staged import PROMPT_SUFFIXES
from prompt_tuning_jax.checkpoints.t5x import is_t5x
from prompt_tuning_jax.checkpoints.tuned_file import StoredTuned, is_tuned_file, read_tuned
from prompt_tuning_jax.config_file import RUN_CONFIG, run_config
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.experiment import Experiment
from prompt_tuning_jax.layout import Layout
from prompt_tuning_jax.methods import (
    PROMPT,
    Attached,
    Context,
    Method,
    NoTuning,
    PromptTuning,
    mask_of,
)
from prompt_tuning_jax.methods.prompt_combine import Placement
from prompt_tuning_jax.models.t5 import T5
from prompt_tuning_jax.overrides import checked, method_from_json
from prompt_tuning_jax.typing import HostArray


@dataclass(frozen=True, kw_only=True)
class OpenedPrompts:
    """Prompts in groups of one shape and joining, in the order given within, and their names."""

    groups: list[build.Members]
    names: tuple[str, ...]
    labels: tuple[str, ...]


def open_prompts(
    experiment: Experiment, model: T5, prompts: Sequence[str | HostArray]
) -> OpenedPrompts:
    """Opens files, runs' folders and arrays; UserError for one that does not fit the model.

    A prompt is joined to the input as it was in its training, where its run or its file says how;
    else as in ``experiment.method``.
    """
    layout = build.layout_of(experiment)
    if not prompts:
        attached = NoTuning().attach(model, key=jax.random.key(0), context=Context())
        return OpenedPrompts(groups=[_bare(attached, layout)], names=("no prompt",), labels=())
    fingerprint = build.model_fingerprint(model)
    default = experiment.method if isinstance(experiment.method, PromptTuning) else PromptTuning()
    arrays: list[tuple[str, HostArray, PromptTuning]] = []
    groups: list[build.Members] = []
    names: list[str] = []
    labels: tuple[str, ...] = ()
    stored_files: list[Path] = []
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str | Path):
            array = np.asarray(prompt, np.float32)
            if array.ndim != 2 or array.shape[1] != model.config.embed_dim:
                raise UserError(
                    f"prompts[{number}] has shape {list(array.shape)}; a prompt for this model is "
                    f"[length, {model.config.embed_dim}]"
                )
            arrays.append((f"prompt {number}", array, _joining(default)))
            continue
        place = Path(prompt)
        run = run_config(str(prompt))
        files = [place]
        if kept := tuned_files(place):
            stored_files += kept
            continue
        if run is not None and isinstance(run.method, PromptTuning):
            if place.is_dir():
                files = run_folder.prompt_files(place, build.member_names(run))
        elif run is not None and place.is_dir():
            groups.append(_members_of_run(run, model, place, layout))
            names += [f"{prompt}/{name}" for name in build.member_names(run)]
            continue
        elif place.is_dir() and (inside := prompt_files(str(place))):
            files = inside
        elif place.is_dir() and not (is_peft(place) or is_t5x(place)):
            raise UserError(
                f"{prompt} is a folder without a run's {RUN_CONFIG}, and does not hold prompts "
                f"alone{_prompts_in(place)}"
            )
        for file in files:
            array, metadata = load_prompt_with_metadata(file)
            check_fits(
                array,
                metadata,
                embed_dim=model.config.embed_dim,
                fingerprint=fingerprint,
                path=file,
            )
            method = run.method if run and isinstance(run.method, PromptTuning) else default
            if metadata.combine:
                placement = checked(metadata.combine, Placement, f"{file}: combine")
                method = dataclasses.replace(method, placement=placement)
            arrays.append((str(file), array, _joining(method)))
            labels = labels or metadata.labels
    alike: dict[tuple[PromptTuning, tuple[int, ...]], list[tuple[str, HostArray]]] = {}
    for name, array, method in arrays:
        alike.setdefault((method, array.shape), []).append((name, array))
    for (method, _), group in alike.items():
        attached = method.with_prompt(model, jnp.asarray(group[0][1]))
        members = _bare(attached, layout)
        stacked = jnp.stack([jnp.asarray(array, jnp.float32) for _, array in group])
        frozen = {name: p for name, p in members.frozen.items() if name != PROMPT}
        groups.append(
            dataclasses.replace(members, tuned={PROMPT: stacked}, frozen=frozen, number=len(group))
        )
        names += [name for name, _ in group]
    for members_of_files, members_labels in _members_of_files(
        stored_files, model, layout, fingerprint
    ):
        groups.append(members_of_files)
        labels = labels or members_labels
    names += map(str, stored_files)
    return OpenedPrompts(groups=groups, names=tuple(names), labels=labels)


def _prompts_in(folder: Path) -> str:
    """Prompts among other things, as the end of a message."""
    inside = sorted(
        child
        for child in folder.iterdir()
        if (is_peft(child) if child.is_dir() else child.suffix in PROMPT_SUFFIXES)
    )
    listed = ", ".join(child.name for child in inside[:5]) + ", ..." * (len(inside) > 5)
    return f"; name one by one the prompts in it: {listed}" if inside else ""


def _joining(method: PromptTuning) -> PromptTuning:
    """Only what matters once the prompt is trained: how it is joined to the input."""
    return PromptTuning(
        placement=method.placement,
        prompt_to_input=method.prompt_to_input,
        prompt_to_prompt=method.prompt_to_prompt,
        input_to_prompt=method.input_to_prompt,
    )


def _bare(attached: Attached, layout: Layout) -> build.Members:
    graphdef, params = tree.split(attached)
    members = build.Members(
        graphdef=graphdef, tuned={}, frozen=params, mask=dict.fromkeys(params, False), number=1
    )
    return members.sharded(layout, tree.logical_axes(attached))


def tuned_files(place: Path) -> list[Path]:
    """The file itself if it is one that a run of any method keeps, or those that a folder holds."""
    if place.is_dir():
        inside = sorted(place.glob("*.safetensors"))
        return inside if inside and all(map(is_tuned_file, inside)) else []
    return [place] if is_tuned_file(place) else []


def _members_of_files(
    files: Sequence[Path], model: T5, layout: Layout, fingerprint: str
) -> Iterator[tuple[build.Members, tuple[str, ...]]]:
    """Members for each run of files that are of one method, and the labels they were trained on."""

    def kind(stored: StoredTuned) -> tuple[Any, ...]:
        return stored.method, stored.tasks, stored.metadata.labels

    opened = [(path, read_tuned(path)) for path in files]
    for path, stored in opened:
        check_model(stored.metadata, fingerprint=fingerprint, path=path)
    for _, alike in itertools.groupby(opened, key=lambda each: kind(each[1])):
        group = list(alike)
        path, first = group[0]
        try:
            method = method_from_json(first.method)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
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
                of=str(path),
            ),
            first.metadata.labels,
        )


def _members_of_run(run: Experiment, model: T5, folder: Path, layout: Layout) -> build.Members:
    labels = build.labels_of(build.build_mixture(run.data)) if run.method.ranks else ()
    return _members(
        run.method,
        run_folder.read_best(folder),
        model,
        layout,
        labels=labels,
        tasks=build.trained_tasks(run.data),
        of=f"the best checkpoint in {folder}",
    )


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
    context = Context(labels=labels, vocabulary=model.vocabulary, tasks=max(len(tasks), 1))
    # How it began is over, and what it began from may be gone.
    fresh: Any = method
    if hasattr(method, "init"):
        fresh = dataclasses.replace(fresh, init="uniform")
    key = jax.random.key(0)
    attached = build.with_config(fresh.attach(model, key=key, context=context), method)
    graphdef, params = tree.split(attached)
    frozen = {name: p for name, p in params.items() if not method.trains(name)}
    own = {name: p for name, p in params.items() if method.trains(name)}
    build.require_trainable(own)
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
