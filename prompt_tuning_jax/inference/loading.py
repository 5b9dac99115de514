"""Opens prompts and runs for use on one frozen model."""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints import run_folder
from prompt_tuning_jax.checkpoints.convert_prompt import prompt_files
from prompt_tuning_jax.checkpoints.destination import PROMPT_SUFFIXES
from prompt_tuning_jax.checkpoints.location import is_address, is_t5x
from prompt_tuning_jax.checkpoints.peft.adapter_file import is_peft
from prompt_tuning_jax.checkpoints.prompt_file import (
    PromptMetadata,
    check_fits,
    for_task,
    is_prompt_file,
    load_prompt_with_metadata,
    tasks_of,
)
from prompt_tuning_jax.checkpoints.run_folder import member_names
from prompt_tuning_jax.checkpoints.tuned_checkpoint import TunedCheckpoint
from prompt_tuning_jax.config.config_file import RUN_CONFIG, run_config
from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.config.methods import Placement
from prompt_tuning_jax.config.overrides import checked
from prompt_tuning_jax.distributed.sharding import Partitioner, make_mesh
from prompt_tuning_jax.errors import UserError, nearest, suggest
from prompt_tuning_jax.inference.api import require_model
from prompt_tuning_jax.inference.loading_methods import (
    known_with,
    members_of_run,
    members_of_stored,
    stored_methods,
)
from prompt_tuning_jax.inference.setup import Members, model_fingerprint, partitioner_of
from prompt_tuning_jax.methods import (
    PROMPT,
    Context,
    Known,
    NoTuning,
    PromptTuning,
    TunedModel,
    attach_method,
)
from prompt_tuning_jax.methods.multitask import TaskPrompts, combined, parts_of
from prompt_tuning_jax.methods.prompt import Prompt, with_prompt
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.storage import expanded
from prompt_tuning_jax.typing import HostArray


@dataclass(frozen=True, kw_only=True)
class LoadedPrompts:
    """Opened prompts, grouped by shape and by how they are joined to the input.

    Within a group the prompts keep the order in which they were given.  ``names`` and ``known``
    have one entry per prompt; ``known`` is the metadata from its file or run.
    """

    groups: list[Members]
    names: tuple[str, ...]
    known: tuple[PromptMetadata, ...]

    def by_name(self) -> dict[str, PromptMetadata]:
        """Returns the metadata by name; a prompt that was given twice has one entry."""
        return dict(zip(self.names, self.known, strict=True))

    def added_positions(self) -> tuple[int, int]:
        """Returns the most positions beside an input's own, and the fewest that are inside it.

        Prefixes are in front of it; an empty input needs positions inside.
        """
        each = [group.added_positions() for group in self.groups] or [(0, 0)]
        return max(map(sum, each)), min(inside for inside, _ in each)


def attach(model: Model, path: str | Path, *, member: str = "", task: str = "") -> TunedModel:
    """Attaches tuned parameters to the model, for use in ``generate``, ``score`` and ``encode``.

    ``path`` is a prompt, a file in ``tuned/``, a PEFT adapter's folder, a T5X checkpoint, or the
    folder of a run of any method.  ``member`` selects one of several members (``seed_0``), and
    ``task`` one of the tasks of a mixture.  The model is not modified, and its arrays are shared.
    Raises UserError if the path holds nothing for this model, or if ``member`` or ``task`` is
    needed to choose.
    """
    given: object = model  # callers may not type-check
    require_model(given)
    if isinstance(given, TunedModel):
        raise UserError("this model has something attached to it already; give the bare model")
    _require_place(path)
    path = os.path.expanduser(path)
    loaded = load_prompts(Experiment(), model, [path], partitioner=where(model))
    members = [(group, number) for group in loaded.groups for number in range(group.number)]
    names = [_member_name(name) for name in loaded.names]
    holds = f"{path} holds {len(names)} member{'s' * (len(names) != 1)}"
    chosen = _chosen(member, names, by="member", holds=holds)
    (group, number), known = members[chosen], loaded.known[chosen]
    trainable = {name: array[number] for name, array in group.trainable.items()}
    attached = param_tree.merge(group.graphdef, {**group.frozen, **trainable})
    tasks = tasks_of(known)
    if isinstance(attached.method, TaskPrompts):
        attached, task = _of_task(attached.method, model, group, task, path)
    elif tasks and task:
        _chosen(task, [one.name for one in tasks], by="task", holds=f"{path} holds tasks")
    elif task:
        raise UserError(f"{path} was not trained on several tasks: leave out task={task!r}")
    known = next((for_task(known, one) for one in tasks if one.name == task), known)
    attached.known = Known(known, run_config(path))
    return attached


def prompt_list(prompts: object) -> list[str | HostArray]:
    """Returns one or several prompts as a list of paths and arrays ``[P, D]``.

    A path or an array with two axes is one prompt; None and () give an empty list.  Raises
    UserError for anything else.
    """
    if prompts is None:
        return []
    is_array = hasattr(prompts, "ndim") and hasattr(prompts, "shape")
    if isinstance(prompts, str | Path) or (is_array and cast(Any, prompts).ndim < 3):
        prompts = [prompts]
    if isinstance(prompts, Mapping) or not isinstance(prompts, Iterable):
        raise UserError(f"prompts must be paths or arrays, not {type(prompts).__name__}")
    listed: list[str | HostArray] = []
    for number, one in enumerate(prompts):
        if isinstance(one, str | Path):
            if not str(one):
                raise UserError(f"prompts[{number}] is an empty path")
            listed.append(os.path.expanduser(one))
            continue
        try:
            array = np.asarray(one, np.float32)
        except (TypeError, ValueError):
            array = np.zeros((), np.float32)
        if not array.ndim:
            raise UserError(
                f"prompts[{number}] is a {type(one).__name__}, and neither a path nor an array of "
                "numbers"
            )
        listed.append(array)
    return listed


def load_prompts(
    experiment: Experiment,
    model: Model,
    prompts: Sequence[str | HostArray],
    *,
    partitioner: Partitioner | None = None,
) -> LoadedPrompts:
    """Opens files, run folders and arrays.

    A prompt is joined to the input as in its training if its run or file records how, and otherwise
    as in ``experiment.method``.  Arrays are sharded by ``partitioner``, which defaults to the
    experiment's mesh.  Without prompts, returns the bare model.  Raises UserError for a prompt that
    does not fit the model.
    """
    partitioner = partitioner or partitioner_of(experiment)
    if not prompts:
        attached = attach_method(model, NoTuning(), key=jax.random.key(0), context=Context())
        bare = PromptMetadata()
        return LoadedPrompts(
            groups=[_sharded(attached, partitioner)], names=("no prompt",), known=(bare,)
        )
    fingerprint = model_fingerprint(model)
    default = experiment.method.plain_prompt() or PromptTuning()
    arrays: list[tuple[str, HostArray, PromptTuning, PromptMetadata]] = []
    groups: list[Members] = []
    names: list[str] = []
    known: list[PromptMetadata] = []
    stored: list[tuple[str, TunedCheckpoint]] = []
    stored_known: list[PromptMetadata] = []
    each_adapter = ((n, one) for n, each in enumerate(prompts) for one in _adapters_in(each))
    for number, prompt in each_adapter:
        if not isinstance(prompt, str | Path):
            array = np.asarray(prompt, np.float32)
            if array.ndim != 2 or array.shape[1] != model.config.embed_dim:
                raise UserError(
                    f"prompts[{number}] has shape {list(array.shape)}; a prompt for this model is "
                    f"[length, {model.config.embed_dim}]"
                )
            arrays.append((f"prompt {number}", array, default, PromptMetadata()))
            continue
        place = Path(prompt)
        run = run_config(str(prompt))
        source = str(prompt) if is_address(str(prompt)) else place
        files: Sequence[str | Path] = [source]
        if kept := stored_methods(source, model):
            stored += kept
            stored_known += [known_with(run, one.metadata) for _, one in kept]
            continue
        # A prompt for images comes with a classifier, as a method's arrays do.
        is_plain = run is not None and not model.config.reads_images
        trained = run.method.plain_prompt() if run is not None and is_plain else None
        if run is not None and trained is not None:
            if run_folder.is_run(place):
                files = run_folder.prompt_files(place, member_names(run))
            elif place.is_dir():
                files = prompt_files(str(place)) or files
        elif run is not None and run_folder.is_run(place):
            members, theirs = members_of_run(run, model, place, partitioner)
            groups.append(members)
            known += theirs
            names += [f"{prompt}/{name}" for name in member_names(run)]
            continue
        elif place.is_dir() and (inside := prompt_files(str(place))):
            files = inside
        elif place.is_dir() and not (is_peft(place) or is_t5x(place)):
            raise UserError(
                f"{prompt} is a folder without a run's {RUN_CONFIG}, and does not hold prompts "
                f"alone{_prompts_in(place)}"
            )
        for file in files:
            array, metadata = load_prompt_with_metadata(
                file, peft_scale=model.config.peft_prompt_scale
            )
            check_fits(
                array,
                metadata,
                embed_dim=model.config.embed_dim,
                fingerprint=fingerprint,
                path=file,
            )
            method = trained or default
            if metadata.combine:
                placement = checked(metadata.combine, Placement, f"{file}: combine")
                method = dataclasses.replace(method, placement=placement)
            arrays.append((str(file), array, method, known_with(run, metadata)))
    by_kind: dict[Any, list[tuple[str, HostArray, PromptMetadata]]] = {}
    for name, array, method, about in arrays:
        by_kind.setdefault((method, array.shape), []).append((name, array, about))
    for (method, _), group in by_kind.items():
        attached = with_prompt(model, group[0][1], method)
        members = _sharded(attached, partitioner)
        stacked = jnp.stack([jnp.asarray(array, jnp.float32) for _, array, _ in group])
        frozen = {name: p for name, p in members.frozen.items() if name != PROMPT}
        groups.append(
            dataclasses.replace(
                members, trainable={PROMPT: stacked}, frozen=frozen, number=len(group)
            )
        )
        names += [name for name, _, _ in group]
        known += [about for _, _, about in group]
    groups += members_of_stored(stored, model, partitioner, fingerprint)
    names += [name for name, _ in stored]
    known += stored_known
    return LoadedPrompts(groups=groups, names=tuple(names), known=tuple(known))


def _adapters_in(prompt: str | Path | HostArray) -> Sequence[str | Path | HostArray]:
    """Returns the entries of a folder of PEFT adapters of any kind; otherwise ``[prompt]``."""
    if not isinstance(prompt, str | Path) or not Path(prompt).is_dir() or is_peft(Path(prompt)):
        return [prompt]
    inside = sorted(p for p in Path(prompt).iterdir() if not p.name.startswith("."))
    adapters = [p for p in inside if p.is_dir() and is_peft(p)]
    others = [p for p in inside if p not in adapters]
    if not adapters or any(p.suffix not in PROMPT_SUFFIXES for p in others):
        return [prompt]
    return [str(p) for p in inside]


def _require_place(path: str | Path) -> None:
    """Raises UserError if ``path`` is not the path of anything that could be attached."""
    given: object = path  # callers may not type-check
    if not isinstance(given, str | Path) or not str(given):
        named = "an empty path" if isinstance(given, str) else type(given).__name__
        raise UserError(
            f"attach takes the path of a run, a file or an adapter, and got {named}; an array is "
            "the prompt of generate, score and encode"
        )
    if "://" in str(given):
        return
    place = expanded(given)
    if not place.exists():
        beside = [one.name for one in place.parent.iterdir()] if place.parent.is_dir() else []
        near = nearest(place.name, beside)
        meant = "" if near is None else f"; did you mean {str(place.parent / near)!r}?"
        raise UserError(f"there is no run, file or adapter {str(given)!r}{meant}")
    if (place / "config.json").is_file():
        raise UserError(f"{given} is a model: open it with load_model instead of attaching it")


def _member_name(name: str) -> str:
    """Returns a member's name: for a prompt file, its name without the suffix.

    Other suffixes are kept, because a run's member name may contain a dot, as in a learning rate.
    """
    place = Path(name)
    return place.stem if place.suffix in PROMPT_SUFFIXES else place.name


def _of_task(
    prompts: TaskPrompts, model: Model, members: Members, task: str, path: str | Path
) -> tuple[TunedModel, str]:
    """Returns the model with the plain prompt of one of several tasks, and the task's name."""
    names = members.tasks or tuple(str(number) for number in range(prompts.num_tasks))
    number = _chosen(task, names, by="task", holds=f"{path} was trained on {len(names)} tasks")
    prompt_PD = combined(prompts.config.combine, prompts.arrays(), number)
    parts = parts_of(prompts.config, prompt_PD)
    return TunedModel(model, Prompt(prompts.config.task_prompt(), *parts)), names[number]


def _chosen(name: str, names: Sequence[str], *, by: str, holds: str) -> int:
    """Returns the index of ``name``, or 0 if it is empty and there is only one name.

    Otherwise raises UserError with a message that begins with ``holds``.
    """
    if name in names:
        return names.index(name)
    if not name and len(names) == 1:
        return 0
    wrong = f"there is no {name!r} in it" if name else f"say which is meant by {by}="
    raise UserError(f"{holds}, and {wrong}; {suggest(name, names)}")


def where(model: Model) -> Partitioner:
    """Returns a partitioner for the mesh of the model's arrays, or for their devices."""
    array = next(iter(param_tree.split(model)[1].values()))
    mesh = getattr(array.sharding, "mesh", None)
    if isinstance(mesh, jax.sharding.Mesh):
        return Partitioner(mesh=mesh)
    return Partitioner(mesh=make_mesh(devices=list(array.devices())))


def _prompts_in(folder: Path) -> str:
    """Returns a hint for the end of a message: the prompts in a folder with other files."""
    inside = sorted(
        child
        for child in folder.iterdir()
        if (is_peft(child) if child.is_dir() else is_prompt_file(child))
    )
    listed = ", ".join(child.name for child in inside[:5]) + ", ..." * (len(inside) > 5)
    return f"; name one by one the prompts in it: {listed}" if inside else ""


def members_of(attached: TunedModel) -> Members:
    """Returns one member whose arrays are all frozen; they are not copied or moved."""
    graphdef, params = param_tree.split(attached)
    return Members(
        graphdef=graphdef, trainable={}, frozen=params, mask=dict.fromkeys(params, False), number=1
    )


def _sharded(attached: TunedModel, partitioner: Partitioner) -> Members:
    return members_of(attached).sharded(partitioner, param_tree.logical_axes(attached))
