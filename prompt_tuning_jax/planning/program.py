"""Compiles an experiment's training and evaluation steps for devices that may not be present."""

import dataclasses
import re
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.config.methods import method_name
from prompt_tuning_jax.distributed.sharding import Partitioner
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.ensemble import DecodeConfig, label_scores, write
from prompt_tuning_jax.inference.setup import Members, attach_unplaced, attention_for
from prompt_tuning_jax.models.base import model_class
from prompt_tuning_jax.models.config import ModelConfig
from prompt_tuning_jax.models.ops.attention_choice import Choice
from prompt_tuning_jax.models.quantization import quantize_modules
from prompt_tuning_jax.planning.hlo import Collective, collectives
from prompt_tuning_jax.planning.hlo_cost import repeated_cost
from prompt_tuning_jax.training import build, optim
from prompt_tuning_jax.training.label_loss import LabelLoss
from prompt_tuning_jax.training.step import TrainState, TrainStep, init_state, state_shardings

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_EXCEEDED = re.compile(r"(?:\(|[Uu]sed )(\d+(?:\.\d+)?)([KMGT])\)? (?:exceeds|of)")


@dataclass(frozen=True, kw_only=True)
class Abstract:
    """An experiment without data: the step, and its arguments as shapes sharded over the mesh."""

    members: Members
    state: TrainState
    step: TrainStep
    partitioner: Partitioner
    attention: Choice


@dataclass(frozen=True, kw_only=True)
class Program:
    """The cost of a compiled program on one chip, in bytes, FLOPs and seconds.

    ``temporary_bytes`` is the peak temporary memory, including activations.  ``fits`` is the
    compiler's answer.  If it is false, ``needed_bytes`` is the amount in the compiler's message,
    and all other numbers are 0.  ``compile_cpu_seconds`` is summed over all cores.
    """

    fits: bool
    needed_bytes: int
    argument_bytes: int = 0
    temporary_bytes: int = 0
    flops: float = 0.0
    bytes_accessed: float = 0.0
    collectives: tuple[Collective, ...] = ()
    compile_seconds: float = 0.0
    compile_cpu_seconds: float = 0.0


def abstract_experiment(
    experiment: Experiment, config: ModelConfig, partitioner: Partitioner
) -> Abstract:
    """Builds the experiment on a model with this config, without creating any array.

    The prompt's initialization is replaced by ``uniform``: others need data and a vocabulary, and
    initial values do not change the step.
    """
    method: Any = experiment.method
    if hasattr(method, "init"):
        method = dataclasses.replace(method, init="uniform")
    # Use the requested number of microbatches, because the default depends on this machine.
    parts = max(experiment.training.gradient_accumulation, 1)
    training = dataclasses.replace(experiment.training, inits=(), gradient_accumulation=parts)
    experiment = dataclasses.replace(experiment, method=method, training=training)
    kept: dict[str, Any] = {}

    if experiment.model.weights == "quantized":
        raise UserError(
            "model.weights=quantized depends on a file's types, which are not planned; plan with "
            "model.quantization=int8 or int4"
        )

    method = experiment.method
    if method.scores_labels or method.num_context_examples():
        raise UserError(
            f"plan knows no labels and texts, on which the size of method={method_name(method)} "
            "depends; plan prompt_tuning or prefix_tuning of a similar length"
        )

    def made() -> tuple[Any, Any]:
        model = model_class(config)(
            config,
            rngs=nnx.Rngs(0),
            dtype=jnp.dtype(experiment.model.dtype),
            param_dtype=jnp.dtype(experiment.model.param_dtype),
            dropout_rate=experiment.model.dropout_rate,
        )
        kept["attention"] = attention_for(experiment, model, partitioner)
        model.attention = kept["attention"]
        quantize_modules(model, experiment.model.quantization)
        members, kept["axes"] = attach_unplaced(experiment, model, labels=())
        kept["members"] = members
        return members.trainable, members.frozen

    trainable, frozen = jax.eval_shape(made)
    axes: Mapping[str, Any] = kept["axes"]
    trainable = _placed(
        trainable, {name: ("ensemble", *each) for name, each in axes.items()}, partitioner
    )
    members = dataclasses.replace(
        kept["members"], trainable=trainable, frozen=_placed(frozen, axes, partitioner)
    )
    optimizer = optim.make_optimizer(experiment.optimizer, members.mask)

    start = jax.eval_shape(lambda trainable: init_state(trainable, optimizer), trainable)
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        start,
        state_shardings(start, trainable, partitioner),
    )
    members = build.with_stacked_layers(experiment, members, partitioner)
    step = build.step_from(
        experiment,
        members,
        state,
        partitioner=partitioner,
        label_loss=_label_loss(experiment),
        regularizer=None,  # its cost is nothing beside the model's
    )
    return Abstract(
        members=members,
        state=state,
        step=step,
        partitioner=partitioner,
        attention=kept["attention"],
    )


def _label_loss(experiment: Experiment) -> LabelLoss | None:
    """Returns the loss over labels of the longest targets, two if the config names none."""
    training, data = experiment.training, experiment.data
    if training.loss == "tokens":
        return None
    number = len(data.labels) or 2
    labels = tuple((2 + label,) * data.targets_length for label in range(number))
    return LabelLoss(kind=training.loss, labels=labels, margin=training.margin)


def compile_train(experiment: Experiment, abstract: Abstract) -> Program:
    """Compiles the training step; costs count every layer and every microbatch of its loops."""
    training, data = experiment.training, experiment.data

    def tokens(length: int) -> jax.ShapeDtypeStruct:
        shape = (len(training.seeds), training.batch_size, length)
        return _tokens(shape, ("ensemble", "batch", "length"), abstract.partitioner)

    batch = {
        "inputs": tokens(data.inputs_length),
        "targets": tokens(data.targets_length),
    }
    if abstract.members.tasks:
        shape = (len(training.seeds), training.batch_size)
        batch["task_index"] = _tokens(shape, ("ensemble", "batch"), abstract.partitioner)
    step: Any = abstract.step
    lowered = step.lower(abstract.state, abstract.members.frozen, batch)
    return _compiled(lowered, abstract.partitioner)


def compile_eval(experiment: Experiment, abstract: Abstract) -> Program:
    """Compiles one batch of the evaluation.

    The strategies ``rank`` and ``auto`` score the labels; the others generate text.  Labels are
    assumed to have the maximum target length; if the config names none, two are assumed.
    Generation is a loop, whose FLOPs and bytes are those of one position.
    """
    evaluation, data = experiment.evaluation, experiment.data
    members, partitioner = abstract.members, abstract.partitioner
    tokens_BT = _tokens(
        (evaluation.batch_size, data.inputs_length), ("batch", "length"), partitioner
    )
    strategy = "rank" if evaluation.strategy == "auto" else evaluation.strategy
    if strategy == "rank":
        shape = (len(data.labels) or 2, data.targets_length)
        labels_CS = _tokens(shape, (None, None), partitioner)
        lowered = label_scores.lower(
            members.graphdef,
            members.trainable,
            members.frozen,
            tokens_BT,
            labels_CS,
            members.number,
            partitioner,
        )
    else:
        writing = DecodeConfig(
            strategy=strategy,
            max_length=data.targets_length,
            num_beams=evaluation.num_beams,
        )
        key = jax.eval_shape(lambda: jax.random.key(0))
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=partitioner.replicated)
        lowered = write.lower(
            members.graphdef,
            writing,
            members.trainable,
            members.frozen,
            tokens_BT,
            key,
            partitioner,
        )
    return _compiled(lowered, partitioner)


def _tokens(shape: Any, axes: Any, partitioner: Partitioner) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=partitioner.sharding(axes, shape))


def _placed(
    arrays: Mapping[str, Any], axes: Mapping[str, Any], partitioner: Partitioner
) -> dict[str, Any]:
    return {
        name: jax.ShapeDtypeStruct(
            array.shape, array.dtype, sharding=partitioner.sharding(axes[name], array.shape)
        )
        for name, array in arrays.items()
    }


def _compiled(lowered: Any, partitioner: Partitioner) -> Program:
    started, cpu = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_utime
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        match = _EXCEEDED.search(str(error))
        needed = int(float(match[1]) * _UNITS[match[2]]) if match else 0
        return Program(fits=False, needed_bytes=needed)
    seconds = time.monotonic() - started
    cpu_seconds = resource.getrusage(resource.RUSAGE_SELF).ru_utime - cpu
    memory, cost, text = (
        compiled.memory_analysis(),
        compiled.cost_analysis() or {},
        compiled.as_text(),
    )
    repeated = repeated_cost(text)
    arguments = int(memory.argument_size_in_bytes)
    outputs = int(memory.output_size_in_bytes - memory.alias_size_in_bytes)
    temporary = int(memory.temp_size_in_bytes)
    return Program(
        fits=True,
        needed_bytes=arguments + temporary + outputs,
        argument_bytes=arguments,
        temporary_bytes=temporary,
        flops=float(cost.get("flops", 0.0)) + repeated.flops,
        bytes_accessed=float(cost.get("bytes accessed", 0.0)) + repeated.bytes,
        collectives=tuple(collectives(text, dict(partitioner.mesh.shape))),
        compile_seconds=seconds,
        compile_cpu_seconds=cpu_seconds,
    )
