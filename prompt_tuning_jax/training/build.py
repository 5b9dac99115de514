"""Experiment -> model, method, optimizer, step: the only file that wires them together."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.fingerprint import fingerprint
from prompt_tuning_jax.checkpoints.load import load_model, random_model
from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.config.field_syntax import parse_rules
from prompt_tuning_jax.data.batching.buckets import Buckets
from prompt_tuning_jax.data.tasks.metrics import EVALUATION_LOSS, LOSS
from prompt_tuning_jax.data.vocabularies.vocab import AnyVocabulary
from prompt_tuning_jax.distributed.partitioner import Partitioner
from prompt_tuning_jax.distributed.sharding import RULES, make_mesh, with_rules
from prompt_tuning_jax.errors import UserError, suggest
from prompt_tuning_jax.inference.decoding.logits_processors import logits_processors
from prompt_tuning_jax.methods import (
    Context,
    Method,
    TunedModel,
    trainable_mask,
)
from prompt_tuning_jax.models.quantization import is_quantized
from prompt_tuning_jax.models.t5.model import T5
from prompt_tuning_jax.training import optim, task_data
from prompt_tuning_jax.training.evaluate import (
    Predictions,
    Predictor,
    chosen_strategy,
    score_members,
)
from prompt_tuning_jax.training.microbatching import NO_MICROBATCHING, Microbatching
from prompt_tuning_jax.training.step import (
    TrainState,
    TrainStep,
    init_state,
    make_train_step,
)
from prompt_tuning_jax.typing import FlatParams, Mask

_log = logging.getLogger(__name__)

# Or the CPU backend lays all weights out anew before the loop over a batch's parts, and the logits'
# in float32: a twelfth of the time and two fifths of the memory of a step.
_OPTIONS_OF_PARTS = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}


@dataclass(frozen=True, kw_only=True)
class Members:
    """A method attached E times to one frozen model: one structure, E sets of tuned arrays.

    ``tasks`` are the names of those trained on where they are several.
    """

    graphdef: nnx.GraphDef[TunedModel]
    trainable: FlatParams  # each with a leading axis E
    frozen: FlatParams
    mask: Mask
    number: int
    tasks: tuple[str, ...] = ()

    def task_number(self, name: str) -> int | None:
        """Which of several tasks has this name; None where it is none of them."""
        return self.tasks.index(name) if name in self.tasks else None

    def sharded(self, partitioner: Partitioner, logical_axes: Mapping[str, Any]) -> "Members":
        """The same, laid out over the mesh; the tuned arrays' leading axis is ``ensemble``."""
        axes_E = {name: ("ensemble", *axes) for name, axes in logical_axes.items()}
        return dataclasses.replace(
            self,
            trainable=partitioner.shard(self.trainable, axes_E),
            frozen=partitioner.shard(self.frozen, logical_axes),
        )


def build_model(experiment: Experiment, *, partitioner: Partitioner | None = None) -> T5:
    """The model that the experiment names, with its vocabulary, its weights on the mesh."""
    partitioner = partitioner_of(experiment) if partitioner is None else partitioner
    config = experiment.model
    kwargs: dict[str, Any] = {
        "dtype": config.dtype,
        "param_dtype": config.param_dtype,
        "dropout_rate": config.dropout_rate,
        "vocabulary": config.vocabulary,
        "quantization": config.quantization,
    }
    if config.random_weights:
        return random_model(config.name_or_path, seed=experiment.training.seeds[0], **kwargs)
    return load_model(config.name_or_path, mesh=partitioner.mesh, rules=partitioner.rules, **kwargs)


def model_fingerprint(model: T5) -> str:
    """Tells this frozen model from others."""
    return model.original_fingerprint or fingerprint(model.config, param_tree.split(model)[1])


def vocabulary_of(model: T5) -> AnyVocabulary:
    """The model's vocabulary; UserError where it came without."""
    if model.vocabulary is None:
        raise UserError("this model came without a vocabulary; set model.vocabulary to its file")
    words: AnyVocabulary = model.vocabulary
    return words


def attach_members(
    experiment: Experiment,
    model: T5,
    *,
    labels: tuple[str, ...],
    partitioner: Partitioner | None = None,
) -> Members:
    """The method attached once per seed, each from its own seed (and init), on the mesh."""
    partitioner = partitioner_of(experiment) if partitioner is None else partitioner
    members, logical_axes = attach_unplaced(experiment, model, labels=labels)
    return members.sharded(partitioner, logical_axes)


def attach_unplaced(
    experiment: Experiment, model: T5, *, labels: tuple[str, ...]
) -> tuple[Members, dict[str, tuple[str | None, ...]]]:
    """The same before anything is laid out, and the logical axes of every parameter."""
    seeds, inits = experiment.training.seeds, experiment.training.inits
    tasks = task_data.trained_tasks(experiment.data)
    context = Context(labels=labels, vocabulary=model.vocabulary, tasks=max(len(tasks), 1))
    trainable: list[dict[str, Any]] = []
    for number, seed in enumerate(seeds):
        method: Any = experiment.method
        if inits:
            method = dataclasses.replace(method, init=inits[number])
        if not labels and (experiment.data.train or experiment.data.eval):
            method = _without_label_init(method)
        # Not the key of dropout: that one is folded with steps from 0.
        key = jax.random.fold_in(jax.random.key(seed), 0x9E3779B9)
        attached: TunedModel = method.attach(model, key=key, context=context)
        # Members may differ in how they start, not in what they are.
        graphdef, params = param_tree.split(with_config(attached, experiment.method))
        mask = trainable_mask(experiment.method, list(params))
        own, frozen = param_tree.partition(params, mask)
        require_trainable(own)
        trainable.append(own)
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


def _without_label_init(method: Any) -> Any:
    """For text of a user's own: what labels leave over is sampled, here all of the prompt."""
    if getattr(method, "init", "") != "class_labels" or getattr(method, "init_labels", ()):
        return method
    _log.warning(
        "method.init=class_labels: the targets are text and there are no labels, so the prompt "
        "starts from sampled vocabulary"
    )
    return dataclasses.replace(method, init="sampled_vocabulary")


def require_trainable(trainable: Mapping[str, Any]) -> None:
    """Raises UserError where a method would train weights that are quantised."""
    if is_quantized(trainable):
        raise UserError(
            "this method trains the model's weights, and they are quantised; "
            "set model.quantization=none"
        )


def partitioner_of(
    experiment: Experiment, *, devices: Sequence[jax.Device] | None = None
) -> Partitioner:
    """The mesh over these devices or all, of all processes, and the rules.

    UserError where it does not fit.  One device needs no mesh, whatever the experiment says.
    """
    config = dataclasses.asdict(experiment.mesh)
    rules = with_rules(config.pop("rules"))
    return Partitioner(mesh=make_mesh(**config, devices=devices), rules=rules)


def train_partitioner(
    experiment: Experiment, *, devices: Sequence[jax.Device] | None = None
) -> Partitioner:
    """As ``partitioner_of``; UserError where the training batch cannot be divided over the mesh."""
    partitioner = partitioner_of(experiment, devices=devices)
    rows = experiment.training.batch_size // max(experiment.training.gradient_accumulation, 1)
    if rows % partitioner.num_batch_shards:
        raise UserError(
            f"training.batch_size {experiment.training.batch_size} cannot be divided over "
            f"{partitioner.num_batch_shards} devices (mesh data x fsdp, with gradient accumulation "
            f"{experiment.training.gradient_accumulation}); change one of them"
        )
    return partitioner


def with_config(attached: TunedModel, method: Method) -> TunedModel:
    """The same module described by ``method``, so that members have one structure."""
    if hasattr(attached.method, "config"):
        attached.method.config = method
    return attached


def microbatching_of(
    experiment: Experiment, members: Members, partitioner: Partitioner
) -> Microbatching:
    """What a step computes one after another, by ``training.gradient_accumulation``."""
    asked = experiment.training.gradient_accumulation
    if asked:
        return Microbatching(parts=asked)
    few_train = param_tree.count(members.trainable) < param_tree.count(members.frozen)
    if not _on_cpu(partitioner) or not partitioner.is_single_device or not few_train:
        return NO_MICROBATCHING
    own = {name: array[0] for name, array in members.trainable.items()}
    config = param_tree.merge(members.graphdef, {**members.frozen, **own}).model.config
    return Microbatching(config=config, prompt_positions=experiment.method.prompt_positions())


def _on_cpu(partitioner: Partitioner) -> bool:
    return all(device.platform == "cpu" for device in partitioner.mesh.devices.flat)


def build_step(
    experiment: Experiment, members: Members
) -> tuple[TrainState, TrainStep, Callable[[int], np.ndarray]]:
    """The state before the first step, the jitted step, and step -> learning rates ``[E]``."""
    partitioner = partitioner_of(experiment)
    training, config = experiment.training, experiment.optimizer
    state = init_state(
        members.trainable, optim.make_optimizer(config, members.mask), partitioner=partitioner
    )
    schedule = optim.make_schedule(config, total_steps=training.steps)

    def learning_rates(at: int) -> np.ndarray:
        return np.asarray(_rates(experiment), np.float32) * float(schedule(jnp.asarray(at)))

    return state, step_from(experiment, members, state, partitioner=partitioner), learning_rates


def step_from(
    experiment: Experiment, members: Members, state: TrainState, *, partitioner: Partitioner
) -> TrainStep:
    """The jitted step for a state that lies like this one, which may be of shapes alone."""
    training, config = experiment.training, experiment.optimizer
    return make_train_step(
        members.graphdef,
        optim.make_optimizer(config, members.mask),
        optim.make_schedule(config, total_steps=training.steps),
        learning_rates=_rates(experiment),
        seeds=training.seeds,
        microbatching=microbatching_of(experiment, members, partitioner),
        loss_normalization=training.loss_normalization,
        z_loss=training.z_loss,
        dropout=experiment.model.dropout_rate > 0 or experiment.method.uses_rng(),
        partitioner=partitioner,
        state_shardings=jax.tree.map(lambda array: array.sharding, state),
        remat=training.remat,
        compiler_options=_OPTIONS_OF_PARTS if _on_cpu(partitioner) else None,
    )


def _rates(experiment: Experiment) -> tuple[float, ...]:
    training = experiment.training
    rate = experiment.optimizer.learning_rate
    return training.learning_rates or (rate,) * len(training.seeds)


def build_predictor(
    experiment: Experiment,
    graphdef: nnx.GraphDef[TunedModel],
    vocabulary: AnyVocabulary,
    *,
    labels: tuple[str, ...],
    partitioner: Partitioner | None = None,
    buckets: Buckets | None = None,
) -> Predictor:
    """What turns inputs into predictions, the way the experiment's evaluation asks for.

    ``partitioner`` and ``buckets`` are the experiment's unless given; with buckets of its own its
    programs are of few shapes whatever the number of inputs.
    """
    config = experiment.evaluation
    return Predictor(
        graphdef=graphdef,
        vocabulary=vocabulary,
        strategy=chosen_strategy(config.strategy, labels),
        batch_size=config.batch_size,
        max_length=experiment.data.targets_length,
        num_beams=config.num_beams,
        normalize_length=config.normalize_length,
        processors=logits_processors(
            min_length=config.min_length,
            repetition_penalty=config.repetition_penalty,
            no_repeat_ngram_size=config.no_repeat_ngram_size,
            max_length=experiment.data.targets_length,
            prefix="evaluation.",
        ),
        labels=labels,
        buckets=task_data.buckets_of(experiment) if buckets is None else buckets,
        few_sizes=buckets is not None,
        partitioner=partitioner_of(experiment) if partitioner is None else partitioner,
    )


def evaluate_members(
    experiment: Experiment,
    members: Members,
    trainable: FlatParams,
    data: task_data.TaskData,
    model: T5,
    *,
    scores_alone: bool = False,
) -> tuple[list[dict[str, float]], dict[str, Predictions]]:
    """Each member's metrics (``task/metric`` where there are several tasks), and predictions.

    With ``scores_alone`` nothing is predicted for a task whose only metric is the loss.
    """
    scores: list[dict[str, float]] = [{} for _ in range(members.number)]
    predictions = {}
    for name, examples in data.evaluation.items():
        labels = examples.task.labels
        predictor = build_predictor(
            experiment, members.graphdef, vocabulary_of(model), labels=labels
        )
        prefix = f"{name}/" if len(data.evaluation) > 1 else ""
        arguments: dict[str, Any] = {
            "members": members.number,
            "task": members.task_number(name),
        }
        if not scores_alone or any(one is not EVALUATION_LOSS for one in examples.task.metrics):
            predictions[name] = predictor.predict(trainable, members.frozen, examples, **arguments)
            scored = score_members(examples, predictions[name])
            for own, values in zip(scores, scored, strict=True):
                own.update({f"{prefix}{metric}": value for metric, value in values.items()})
        if data.wants_loss(examples.task) and f"{prefix}{LOSS}" not in scores[0]:
            losses = predictor.losses(trainable, members.frozen, examples, **arguments)
            for own, loss in zip(scores, losses, strict=True):
                own[f"{prefix}{LOSS}"] = loss
    return scores, predictions


def member_names(experiment: Experiment) -> tuple[str, ...]:
    """A name per member that says what sets it apart, fit for a file."""
    training = experiment.training
    names = []
    for number, seed in enumerate(training.seeds):
        parts = [f"seed_{seed}"]
        if training.learning_rates:
            parts.append(f"lr_{training.learning_rates[number]!r}")
        if training.inits:
            parts.append(training.inits[number])
        names.append("_".join(parts))
    return tuple(names)


def workdir_of(experiment: Experiment) -> Path:
    """The run's folder; UserError where none is named."""
    if not experiment.training.workdir:
        raise UserError("training.workdir is empty; say where to keep the run with --workdir")
    return Path(experiment.training.workdir).expanduser()
