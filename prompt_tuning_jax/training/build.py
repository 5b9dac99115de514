"""Builds the optimizer state and the jitted training step of an experiment."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.compilation import return_memory_of_compilers
from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.data.vocabularies.class_vocabulary import ClassVocabulary
from prompt_tuning_jax.data.vocabularies.vocab import AnyVocabulary
from prompt_tuning_jax.distributed.sharding import Partitioner, stack
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.ensemble import abstract_member
from prompt_tuning_jax.inference.setup import Members, partitioner_of
from prompt_tuning_jax.models.layers import Remat
from prompt_tuning_jax.models.quantization import bytes_of
from prompt_tuning_jax.training import optim
from prompt_tuning_jax.training.label_loss import LabelLoss, task_label_sets
from prompt_tuning_jax.training.step import (
    NO_MICROBATCHING,
    Microbatching,
    TrainState,
    TrainStep,
    activation_bytes,
    init_state,
    make_train_step,
)
from prompt_tuning_jax.training.wayward import Regularizer, wayward_regularizer

# Without this option, the CPU backend transposes all weights before the loop over microbatches, and
# those of the logits in float32.  That takes a twelfth of a step's time, and two fifths of its
# memory.
_CPU_OPTIONS = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
_LARGE_ACTIVATIONS = 5 * 10**8
_NONE_TO_DOTS = 2.5  # how much more ``remat=none`` stores than ``dots``
# The CPU backend removes optimization barriers before it merges equal computations.  What a
# backward pass is to compute again is then kept from the forward pass after all.
_CPU_REMAT_OPTIONS = {
    "xla_disable_hlo_passes": "while-loop-invariant-code-motion,cse_barrier_expander"
}


def train_partitioner(
    experiment: Experiment, *, devices: Sequence[jax.Device] | None = None
) -> Partitioner:
    """Returns the partitioner; raises UserError if its mesh does not divide the training batch."""
    partitioner = partitioner_of(experiment, devices=devices)
    rows = experiment.training.batch_size // max(experiment.training.gradient_accumulation, 1)
    if rows % partitioner.num_batch_shards:
        raise UserError(
            f"training.batch_size {experiment.training.batch_size} cannot be divided over "
            f"{partitioner.num_batch_shards} devices (mesh data x fsdp, with gradient accumulation "
            f"{experiment.training.gradient_accumulation}); change one of them"
        )
    return partitioner


def microbatching_of(
    experiment: Experiment, members: Members, partitioner: Partitioner
) -> Microbatching:
    """Returns the microbatching that ``training.gradient_accumulation`` asks for.

    0 fits the microbatches to the cache on a single CPU device where most parameters are frozen,
    and splits nothing elsewhere.
    """
    num_microbatches = experiment.training.gradient_accumulation
    if num_microbatches:
        return Microbatching(num_microbatches=num_microbatches)
    few_train = param_tree.count(members.trainable) < param_tree.count(members.frozen)
    if not _on_cpu(partitioner) or not partitioner.is_single_device or not few_train:
        return NO_MICROBATCHING
    model = members.model()
    prompt = experiment.method.prompt_positions()
    # A prompt that sees no input is read once for all rows.
    shared = model.causal or not getattr(experiment.method, "prompt_to_input", True)
    return Microbatching(
        config=model.config,
        prompt_positions=0 if shared else prompt,
        shared_positions=prompt if shared else 0,
        frozen_bytes=bytes_of(members.frozen),
    )


def _on_cpu(partitioner: Partitioner) -> bool:
    return all(device.platform == "cpu" for device in partitioner.mesh.devices.flat)


def with_stacked_layers(
    experiment: Experiment, members: Members, partitioner: Partitioner
) -> Members:
    """Makes the model loop over equal layers, with their frozen parameters stacked.

    Returns ``members`` if ``training.scan_layers`` asks for no loop; otherwise ``members`` lacks
    the stacked parameters afterwards, so that no array is held twice.
    """
    scan_layers = experiment.training.scan_layers
    if scan_layers == "off" or (scan_layers == "auto" and _on_cpu(partitioner)):
        return members
    tuned = abstract_member(members.graphdef, members.trainable, members.frozen)
    tuned.model.scan_layers = True
    return dataclasses.replace(
        members,
        graphdef=param_tree.split(tuned)[0],
        frozen=param_tree.stack_layers(members.frozen, stack),
    )


def build_step(
    experiment: Experiment,
    members: Members,
    *,
    task_labels: Sequence[Sequence[str]] = (),
) -> tuple[TrainState, TrainStep, Callable[[int], np.ndarray]]:
    """Returns the initial state, the jitted step, and a function step -> learning rates ``[E]``.

    ``task_labels`` are the labels of each task that is trained on, which ``training.loss`` needs
    if it is not ``tokens``.
    """
    partitioner = partitioner_of(experiment)
    training, config = experiment.training, experiment.optimizer
    if _on_cpu(partitioner):
        return_memory_of_compilers()
    state = init_state(
        members.trainable, optim.make_optimizer(config, members.mask), partitioner=partitioner
    )
    schedule = optim.make_schedule(config, total_steps=training.steps)

    def learning_rates(at: int) -> np.ndarray:
        return np.asarray(_rates(experiment), np.float32) * float(schedule(jnp.asarray(at)))

    vocabulary = members.model().vocabulary
    step = step_from(
        experiment,
        members,
        state,
        partitioner=partitioner,
        label_loss=label_loss_of(experiment, vocabulary, task_labels),
        regularizer=wayward_regularizer(experiment, members.graphdef, vocabulary),
    )
    return state, step, learning_rates


def label_loss_of(
    experiment: Experiment, vocabulary: AnyVocabulary | None, task_labels: Sequence[Sequence[str]]
) -> LabelLoss | None:
    """Returns the loss over labels that the experiment asks for; None for that of tokens.

    Raises UserError if the labels are unknown.
    """
    training = experiment.training
    if training.loss == "tokens":
        return None
    if isinstance(vocabulary, ClassVocabulary) or vocabulary is None:
        raise UserError(
            f"training.loss={training.loss} scores labels by their tokens, and this model "
            f"{'has no vocabulary' if vocabulary is None else 'reads images'}; set it to tokens"
        )
    labels = tuple(
        dict.fromkeys(label for labels_of_task in task_labels for label in labels_of_task)
    )
    sets = task_label_sets(task_labels, labels)
    return LabelLoss(
        kind=training.loss,
        labels=tuple(map(tuple, vocabulary.encode_targets(labels))),
        task_labels=sets,
        margin=training.margin,
        normalize_length=training.normalize_length,
    )


def step_from(
    experiment: Experiment,
    members: Members,
    state: TrainState,
    *,
    partitioner: Partitioner,
    label_loss: LabelLoss | None,
    regularizer: Regularizer | None,
) -> TrainStep:
    """Returns the jitted step for states sharded like ``state``, which may be abstract."""
    training, config = experiment.training, experiment.optimizer
    microbatching = microbatching_of(experiment, members, partitioner)
    remat = _remat_of(experiment, members, microbatching, partitioner)
    return make_train_step(
        members.graphdef,
        optim.make_optimizer(config, members.mask),
        optim.make_schedule(config, total_steps=training.steps),
        learning_rates=_rates(experiment),
        seeds=training.seeds,
        microbatching=microbatching,
        loss_normalization=training.loss_normalization,
        z_loss=training.z_loss,
        label_loss=label_loss,
        regularizer=regularizer,
        dropout=experiment.model.dropout_rate > 0 or experiment.method.uses_rng(),
        partitioner=partitioner,
        state_shardings=jax.tree.map(lambda array: array.sharding, state),
        remat=remat,
        compiler_options=_compiler_options(remat, partitioner),
    )


def _remat_of(
    experiment: Experiment,
    members: Members,
    microbatching: Microbatching,
    partitioner: Partitioner,
) -> Remat:
    """Returns ``training.remat``, or ``dots`` if a CPU would hold more than half a GB for ``none``.

    Measured with SmolLM2-135M, 16 rows of 128 positions and a prompt of 100: both take 15 s of CPU
    time a step, and their activations 2.2 and 0.8 GB.
    """
    training, length = experiment.training, experiment.data.inputs_length
    if training.remat != "none" or not _on_cpu(partitioner):
        return training.remat
    config = members.model().config
    rows = training.batch_size // microbatching.microbatches(training.batch_size, length)
    positions = rows * (config.input_positions(length) + experiment.method.prompt_positions())
    size = _NONE_TO_DOTS * positions * activation_bytes(config)
    return "dots" if size > _LARGE_ACTIVATIONS else "none"


def _compiler_options(remat: Remat, partitioner: Partitioner) -> Mapping[str, str] | None:
    if not _on_cpu(partitioner):
        return None
    return _CPU_OPTIONS if remat == "none" else _CPU_REMAT_OPTIONS


def _rates(experiment: Experiment) -> tuple[float, ...]:
    training = experiment.training
    rate = experiment.optimizer.learning_rate
    return training.learning_rates or (rate,) * len(training.seeds)
