"""Measures a training step: its time and its memory."""

import dataclasses
import statistics
import time
from typing import Any

import jax

from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.data.batching import task_data
from prompt_tuning_jax.inference.setup import (
    attach_members,
    build_model,
    partitioner_of,
    vocabulary_of,
)
from prompt_tuning_jax.training import build

_STEPS = 10


def step_cost_of(of: Experiment) -> dict[str, Any]:
    """Returns the median seconds and the peak bytes of one member's step.

    Inputs are padded to their full length.
    """
    training = dataclasses.replace(
        of.training, seeds=of.training.seeds[:1], learning_rates=(), inits=()
    )
    of = dataclasses.replace(
        of, training=training, data=dataclasses.replace(of.data, buckets="none")
    )
    model = build_model(of)
    data = task_data.build_data(of, vocabulary_of(model))
    members, partitioner = attach_members(of, model, labels=data.labels), partitioner_of(of)
    del model  # its arrays are those of the members, which are stacked next
    members = build.with_stacked_layers(of, members, partitioner)
    state, step, _ = build.build_step(of, members, task_labels=data.task_labels)
    batches = list(data.batches(0, _STEPS, partitioner))
    compiled = _lowered(step, state, members.frozen, batches[0]).compile()
    seconds = []
    for batch in batches:
        started = time.perf_counter()
        state, metrics = compiled(state, members.frozen, batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - started)
    memory = compiled.memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + outputs
    return {"step_seconds": statistics.median(seconds), "step_bytes": int(peak)}


def _lowered(step: Any, *arguments: Any) -> Any:
    return step.lower(*arguments)
