"""Short prompt-tuning runs that test whether a model in pre-training responds to prompts yet."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from prompt_tuning_jax.config.experiment import Data, Experiment, Optimizer, Training
from prompt_tuning_jax.data.batching import task_data
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.predictor import evaluate_members
from prompt_tuning_jax.inference.setup import attach_members, vocabulary_of
from prompt_tuning_jax.methods import PromptTuning
from prompt_tuning_jax.models.t5.model import T5
from prompt_tuning_jax.training import build
from prompt_tuning_jax.typing import FlatParams

PROMPT_LENGTH = 20
STEPS = 100
BATCH_SIZE = 32
INPUTS_LENGTH = 48
EVAL_EXAMPLES = 400


def probe_names(specs: Sequence[str]) -> tuple[str, ...]:
    """Returns the name of each probe: its task, or its training file.

    Files of the same name have that of their folder in front.  Raises UserError if two names are
    still the same, because one score would hide the other.
    """
    files = [Path(spec.partition(":")[0]) if ":" in spec else None for spec in specs]
    stems = [spec if file is None else file.stem for spec, file in zip(specs, files, strict=True)]
    names = [
        stem if file is None or stems.count(stem) == 1 else f"{file.absolute().parent.name}_{stem}"
        for stem, file in zip(stems, files, strict=True)
    ]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"data.probes has two probes named {name}; rename a file or its folder")
    return tuple(names)


class Probe:
    """One task and a prompt for it, tuned from the same initial prompt for every score.

    ``spec`` names a task, or two files of examples as ``TRAIN:EVAL``.  The settings are fixed: 100
    steps of 32 examples, 20 prompt positions, and Adafactor with a learning rate that falls from
    0.3 to 0.  Scores compare models; they do not show the best that prompt tuning can reach.
    """

    def __init__(self, spec: str, experiment: Experiment, model: T5) -> None:
        train, _, evaluation = spec.partition(":")
        data = Data(
            task="" if evaluation else spec,
            module=experiment.data.module,
            data_dir=experiment.data.data_dir,
            cache=experiment.data.cache,
            train=train if evaluation else "",
            eval=evaluation,
            inputs_length=INPUTS_LENGTH,
            buckets="none",
            targets_length=experiment.data.targets_length,
            max_eval_examples=EVAL_EXAMPLES,
        )
        self._experiment = dataclasses.replace(
            experiment,
            method=PromptTuning(length=PROMPT_LENGTH),
            data=data,
            evaluation=dataclasses.replace(experiment.evaluation, best_by="", best_mode="auto"),
            optimizer=Optimizer(learning_rate=0.3, schedule="linear"),
            training=Training(steps=STEPS, batch_size=BATCH_SIZE, seeds=(0,)),
        )
        self._partitioner = partitioner = build.train_partitioner(self._experiment)
        words = vocabulary_of(model)
        self._data = task_data.build_data(
            self._experiment, words, window=model.config.max_positions, partitioner=partitioner
        )
        self._members = attach_members(self._experiment, model, labels=self._data.labels)
        # The weights are an argument, so the step compiles only once.
        self._start, self._step, _ = build.build_step(self._experiment, self._members)

    def score(self, weights: FlatParams) -> float:
        """Tunes a prompt on ``weights`` and returns the score by which evaluation chooses.

        The names of ``weights`` are those that FullTuning uses.
        """
        data = self._data
        frozen = {name: weights[name] for name in self._members.frozen}
        # A step donates its state, so it gets a copy of the initial state.
        state = jax.tree.map(jnp.copy, self._start)
        for batch in data.batches(0, STEPS, self._partitioner):
            state, _ = self._step(state, frozen, batch)
        members = dataclasses.replace(self._members, frozen=frozen)
        (scores,), _ = evaluate_members(self._experiment, members, state.trainable, data)
        return scores[data.best_by]
