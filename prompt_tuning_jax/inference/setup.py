"""Builds the mesh, the frozen model and the attached methods of an experiment.

Training, evaluation, prediction, serving and planning all use this module.
"""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints import train_state
from prompt_tuning_jax.checkpoints.fingerprint import fingerprint
from prompt_tuning_jax.checkpoints.load import load_model, random_model
from prompt_tuning_jax.checkpoints.prompt_file import load_prompt_with_metadata
from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.config.field_syntax import parse_rules
from prompt_tuning_jax.config.methods import split_init
from prompt_tuning_jax.data.tasks.demonstrations import Demonstrations, draw
from prompt_tuning_jax.data.tasks.selection import build_mixture, trained_tasks
from prompt_tuning_jax.data.vocabularies.vocab import AnyVocabulary
from prompt_tuning_jax.distributed.sharding import RULES, Partitioner, make_mesh, with_rules
from prompt_tuning_jax.errors import UserError, suggest
from prompt_tuning_jax.inference.ensemble import abstract_member, abstract_model
from prompt_tuning_jax.methods import (
    PROMPT,
    Context,
    MethodConfig,
    TunedModel,
    attach_method,
    trainable_mask,
)
from prompt_tuning_jax.methods.multitask import ARRAYS
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.models.injections import Injections
from prompt_tuning_jax.models.ops.attention_choice import Choice, Usage, choose_attention
from prompt_tuning_jax.models.quantization import is_quantized
from prompt_tuning_jax.storage import expanded
from prompt_tuning_jax.typing import Array, FlatParams, HostArray, Mask

_log = logging.getLogger(__name__)
_LARGEST_TEXT = 2**24  # bytes
# T5's, of a whole stack or a layer, which the attention kernel has no gradient for.
_POSITION_BIASES = (
    "model/encoder/relpos_bias/rel_embedding",
    "model/encoder/layers_0/relpos_bias/rel_embedding",
)


@dataclass(frozen=True, kw_only=True)
class Members:
    """A method attached E times to one frozen model, with one structure and E sets of arrays.

    ``tasks`` are the names of the training tasks if there are several.
    """

    graphdef: nnx.GraphDef[TunedModel]
    trainable: FlatParams  # all arrays have a leading axis E
    frozen: FlatParams
    mask: Mask
    number: int
    tasks: tuple[str, ...] = ()

    def model(self) -> Model:
        """Returns ``abstract_model``; that of an image model has the tuned classes."""
        return abstract_model(self.graphdef, self.trainable, self.frozen)

    def added_positions(self) -> tuple[int, int]:
        """Returns how many positions the method puts into an input, and in front of it."""
        return added_positions(abstract_member(self.graphdef, self.trainable, self.frozen))

    def task_number(self, name: str) -> int | None:
        """Returns the index of the task with this name, or None if there is no such task."""
        return self.tasks.index(name) if name in self.tasks else None

    def sharded(self, partitioner: Partitioner, logical_axes: Mapping[str, Any]) -> "Members":
        """Returns the members sharded over the mesh.

        The logical name of the tuned arrays' leading axis is ``ensemble``.
        """
        axes_E = {name: ("ensemble", *axes) for name, axes in logical_axes.items()}
        return dataclasses.replace(
            self,
            trainable=partitioner.shard(self.trainable, axes_E),
            frozen=partitioner.shard(self.frozen, logical_axes),
        )


def added_positions(attached: TunedModel, *, rows: int = 1) -> tuple[int, int]:
    """Returns how many positions the method puts into an input, and in front of it.

    The latter are prefixes, which have keys and values and no hidden states.  ``rows`` is the batch
    size that a method with arrays for each row needs.
    """
    if attached.model.config.reads_images:
        return attached.method.config.prompt_positions(), 0
    graphdef, params = param_tree.split(attached)

    def injections(params: FlatParams, tokens_BT: Array, task_B: Array) -> Injections:
        tuned: TunedModel = param_tree.merge(graphdef, params)
        return tuned.injections(tokens_BT, task_B=task_B)

    tokens_BT = jax.ShapeDtypeStruct((rows, 2), jnp.int32)
    task_B = jax.ShapeDtypeStruct((rows,), jnp.int32)
    shapes = jax.eval_shape(injections, params, tokens_BT, task_B)
    inside = 0
    if (source := shapes.model_input) is not None:
        inside += source.mask_BU.shape[1] - tokens_BT.shape[1]
        inside += 0 if source.prompt_BPD is None else source.prompt_BPD.shape[1]
    before = sum(layers[0].key_BPGK.shape[1] for layers in shapes.prefixes.values())
    return inside, before


# In a block of ``shared_model``: the last model of ``build_model``, by what it was built for.
_shared: ContextVar[dict[Any, Model] | None] = ContextVar("_shared", default=None)


@contextmanager
def shared_model() -> Iterator[None]:
    """Within the block, ``build_model`` returns its last model again where it would be the same.

    Studies of many runs on one frozen model hold it in memory once, and load it once.
    """
    token = _shared.set({})
    try:
        yield
    finally:
        _shared.reset(token)


def build_model(experiment: Experiment, *, partitioner: Partitioner | None = None) -> Model:
    """Loads the experiment's model and vocabulary, with the weights placed on the mesh."""
    partitioner = partitioner_of(experiment) if partitioner is None else partitioner
    shared = _shared.get()
    if shared is None or experiment.model.random_weights:  # pre-training changes such a model
        model = _build_model(experiment, partitioner)
    else:
        key = (experiment.model, partitioner)
        if key not in shared:
            shared.clear()  # before the next one is loaded
            shared[key] = _build_model(experiment, partitioner)
        model = shared[key]
    model.attention = attention_for(experiment, model, partitioner)
    return model


def _build_model(experiment: Experiment, partitioner: Partitioner) -> Model:
    config = experiment.model
    kwargs: dict[str, Any] = {
        "dtype": config.dtype,
        "param_dtype": config.param_dtype,
        "dropout_rate": config.dropout_rate,
        "vocabulary": config.vocabulary,
        "quantization": config.quantization,
    }
    model: Model
    if config.random_weights:
        model = random_model(config.name_or_path, seed=experiment.training.seeds[0], **kwargs)
    else:
        model = load_model(
            config.name_or_path,
            mesh=partitioner.mesh,
            rules=partitioner.rules,
            weights=config.weights,
            **kwargs,
        )
    model.logits_mb = config.logits_mb
    return model


def attention_for(experiment: Experiment, model: Model, partitioner: Partitioner) -> Choice:
    """Chooses how the model computes attention at the experiment's longest inputs.

    Raises UserError if ``model.attention=fused`` asks for a kernel that there is none of.
    """
    method, config = experiment.method, experiment.model
    device = partitioner.mesh.devices.flat[0]
    prompt, before = method.prompt_positions(), method.context_positions()  # with a prefix
    inputs = experiment.data.inputs_length
    if model.config.max_positions is not None:
        inputs = min(inputs, model.config.max_positions - before)
    usage = Usage(
        platform=device.platform,
        # A decoder-only model's prompt attends by itself.
        queries=inputs if model.causal else inputs + prompt,
        keys=inputs + before,
        trains_weights=any(method.trains(name) for name in _POSITION_BIASES),
        dropout=config.dropout_rate > 0,
        compute_capability=float(getattr(device, "compute_capability", 0) or 0),
    )
    return choose_attention(config.attention, model.attention_traits, usage)


def model_fingerprint(model: Model) -> str:
    """Returns a fingerprint that identifies this frozen model."""
    return model.original_fingerprint or fingerprint(model.config, param_tree.split(model)[1])


def vocabulary_of(model: Model) -> AnyVocabulary:
    """Returns the model's vocabulary; raises UserError if it has none."""
    if model.vocabulary is None:
        raise UserError("this model came without a vocabulary; set model.vocabulary to its file")
    words: AnyVocabulary = model.vocabulary
    return words


def attach_members(
    experiment: Experiment,
    model: Model,
    *,
    labels: tuple[str, ...],
    partitioner: Partitioner | None = None,
) -> Members:
    """Attaches the method once per seed, with the seed's init if set, and shards it on the mesh."""
    partitioner = partitioner_of(experiment) if partitioner is None else partitioner
    members, logical_axes = attach_unplaced(experiment, model, labels=labels)
    return members.sharded(partitioner, logical_axes)


def attach_unplaced(
    experiment: Experiment, model: Model, *, labels: tuple[str, ...]
) -> tuple[Members, dict[str, tuple[str | None, ...]]]:
    """Like ``attach_members``, but unsharded; also returns the logical axes of every parameter.

    Trainable arrays are float32, whatever the dtype of the model's weights.
    """
    seeds, inits = experiment.training.seeds, experiment.training.inits
    tasks = trained_tasks(experiment.data)
    examples = context_examples(experiment)
    trainable: list[dict[str, Any]] = []
    for number, seed in enumerate(seeds):
        method = experiment.method
        if inits:
            init, path = split_init(inits[number])
            path = path or getattr(method, "init_path", "")
            changed: dict[str, Any] = {"init": init} | ({"init_path": path} if path else {})
            method = dataclasses.replace(method, **changed)
        if not labels and (experiment.data.train or experiment.data.eval):
            method = _without_label_init(method)
        # A different key from dropout, which folds in step numbers from 0.
        key = jax.random.fold_in(jax.random.key(seed), 0x9E3779B9)
        context = Context(
            labels=labels,
            vocabulary=model.vocabulary,
            num_tasks=max(len(tasks), 1),
            init_arrays=read_init_arrays(method, peft_scale=model.config.peft_prompt_scale),
            init_text=read_init_text(method),
            examples=examples,
        )
        attached = attach_method(model, method, key=key, context=context)
        # Members may have different initializations, but must share one structure.
        attached.method.config = experiment.method
        graphdef, params = param_tree.split(attached)
        mask = trainable_mask(experiment.method, list(params))
        own, frozen = param_tree.partition(params, mask)
        require_trainable(own)
        # bfloat16 would round away updates of less than a 256th of a weight.
        trainable.append({name: array.astype(jnp.float32) for name, array in own.items()})
    members = Members(
        graphdef=graphdef,
        trainable={name: jnp.stack([own[name] for own in trainable]) for name in trainable[0]},
        frozen=frozen,
        mask=mask,
        number=len(seeds),
        tasks=tasks,
    )
    axes = param_tree.logical_axes(attached)
    used = {axis for own in axes.values() for axis in own if axis is not None}
    for axis in parse_rules(experiment.mesh.rules):
        if axis not in RULES and axis not in used:
            raise UserError(f"mesh.rules: no array has the axis {axis!r}: {suggest(axis, RULES)}")
    return members, axes


def context_examples(experiment: Experiment) -> Demonstrations:
    """Draws the training examples that the method starts from, with the first seed.

    Raises UserError if the data has no training split.
    """
    method, data = experiment.method, experiment.data
    shots = method.num_context_examples()
    if not shots:
        return ()
    tasks = [task for task in build_mixture(data).tasks if data.train_split in task.splits]
    if not tasks:
        raise UserError(
            f"method.shots takes examples from the split {data.train_split!r}, which the data does "
            "not have; set data.train to a file, or method.examples"
        )
    return draw(
        [example for task in tasks for example in task.load(data.train_split, data.data_dir)],
        labels=tuple(dict.fromkeys(label for task in tasks for label in task.labels)),
        shots=shots,
        balanced=method.balances_labels(),
        seed=experiment.training.seeds[0],
    )


def read_init_text(method: MethodConfig) -> str:
    """Reads the text of ``init=text`` from the file at ``init_path``; empty if there is none.

    Raises UserError if the file cannot be read, is too large, or is not UTF-8.
    """
    init_path = getattr(method, "init_path", "")
    if getattr(method, "init", "") != "text" or not init_path:
        return ""
    path = expanded(init_path)
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_TEXT + 1)
        if len(data) > _LARGEST_TEXT:
            raise UserError(
                f"method.init_path: {init_path} has more than {_LARGEST_TEXT:,} bytes; give a "
                "shorter text"
            )
        return data.decode("utf-8")
    except OSError as error:
        raise UserError(f"method.init_path: cannot read {init_path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"method.init_path: {init_path} is not a text file in UTF-8") from error


def read_init_arrays(method: MethodConfig, *, peft_scale: float = 1.0) -> dict[str, HostArray]:
    """Reads a method's initial arrays, by path, from the file or run at its ``init_path``.

    The dictionary is empty for initializations that read no file.  ``peft_scale``
    (``ModelConfig.peft_prompt_scale``) multiplies a PEFT adapter's prompt.  Raises UserError if
    ``init_path`` lacks the needed arrays.
    """
    init, init_path = getattr(method, "init", ""), getattr(method, "init_path", "")
    if init not in ("file", "source"):
        return {}
    if not init_path:
        what = "a prompt file" if init == "file" else "the folder of a run of multitask_prompts"
        raise UserError(f"method.init={init} needs method.init_path, {what}")
    if init == "file":
        return {PROMPT: load_prompt_with_metadata(init_path, peft_scale=peft_scale)[0]}
    member: int = getattr(method, "source_member", 0)
    best = train_state.read_latest(expanded(init_path) / train_state.BEST)
    if best is None:
        raise UserError(
            f"method.init_path: {init_path} has no best checkpoint; give the folder of a run of "
            "multitask_prompts that has been evaluated"
        )
    arrays = {name.removeprefix("trainable/"): np.asarray(leaf) for name, leaf in best[1].items()}
    known = {name: arrays[name] for name in ARRAYS if name in arrays}
    if len(known) < 2:
        raise UserError(f"method.init_path: {init_path} is not a run of multitask_prompts")
    members = len(next(iter(known.values())))
    if member >= members:
        raise UserError(
            f"method.source_member is {member} and {init_path} has {members} "
            "members, counted from 0"
        )
    return {name: array[member] for name, array in known.items()}


def _without_label_init(method: MethodConfig) -> MethodConfig:
    sampled = method.without_label_init()
    if sampled != method:
        _log.warning(
            "method.init=class_labels: the targets are text and there are no labels, so the prompt "
            "starts from sampled vocabulary"
        )
    return sampled


def require_trainable(trainable: Mapping[str, Any]) -> None:
    """Raises UserError if a method would train quantized weights."""
    integers = (not jnp.issubdtype(array.dtype, jnp.inexact) for array in trainable.values())
    if is_quantized(trainable) or any(integers):
        raise UserError(
            "this method trains the model's weights, and they are quantized; "
            "set model.quantization=none and model.weights=dequantized"
        )


def partitioner_of(
    experiment: Experiment, *, devices: Sequence[jax.Device] | None = None
) -> Partitioner:
    """Returns the mesh and sharding rules over ``devices``, by default those of all processes.

    A single device needs no mesh, whatever the experiment's settings.  Raises UserError if the mesh
    does not fit the devices.
    """
    config = dataclasses.asdict(experiment.mesh)
    rules = with_rules(config.pop("rules"))
    return Partitioner(mesh=make_mesh(**config, devices=devices), rules=rules)
