"""Pre-trains a model on text, or trains it from a weight initialization other than T5's."""

from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.data.batching.task_data import build_data
from prompt_tuning_jax.distributed.sharding import Partitioner
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.setup import Members, vocabulary_of
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.models.t5.model import T5
from prompt_tuning_jax.pretraining.initializations import start_attention
from prompt_tuning_jax.pretraining.probes import Probe, probe_names
from prompt_tuning_jax.pretraining.text_data import (
    TextData,
    build_text_data,
    start_from_cooccurrence,
    text_losses,
)
from prompt_tuning_jax.training.run import Evaluate, RunResult, TaskEvaluation, TrainingData, run
from prompt_tuning_jax.typing import FlatParams


def pretrain(experiment: Experiment, *, quiet: bool = False) -> RunResult:
    """Trains on ``data.objectives``, or on a task if there are none.

    The ``model`` fields choose the initialization of random weights.  As with ``train``, the run
    has a working directory and can be resumed.
    """
    return run(experiment, _prepare, quiet=quiet)


def _prepare(
    experiment: Experiment, model: Model, partitioner: Partitioner
) -> tuple[TrainingData, Evaluate]:
    if not experiment.data.objectives:
        if experiment.model.embeddings == "cooccurrence":
            raise UserError("model.embeddings=cooccurrence needs text; set data.objectives")
        _initialize(experiment, model, None)
        tasks = build_data(
            experiment,
            vocabulary_of(model),
            window=model.config.max_positions,
            partitioner=partitioner,
        )
        return tasks, TaskEvaluation(experiment, tasks)
    if not isinstance(model, T5):
        raise UserError("data.objectives are T5's: they need an encoder-decoder; leave them out")
    data = build_text_data(experiment, vocabulary_of(model))
    _initialize(experiment, model, data)
    names = probe_names(experiment.data.probes)
    probes = [Probe(spec, experiment, model) for spec in experiment.data.probes]

    def evaluate(members: Members, trainable: FlatParams) -> list[dict[str, float]]:
        scores = text_losses(members.graphdef, trainable, members.frozen, data, partitioner)
        for member, metrics in enumerate(scores):
            weights = {**members.frozen, **{name: x[member] for name, x in trainable.items()}}
            for name, probe in zip(names, probes, strict=True):
                metrics[f"probe_{name}"] = probe.score(weights)
        return scores

    return data, evaluate


def _initialize(experiment: Experiment, model: Model, data: TextData | None) -> None:
    config = experiment.model
    inits = (config.embeddings, config.attention_init)
    if not config.random_weights or inits == (
        "normal",
        "normal",
    ):
        return
    if not isinstance(model, T5):
        raise UserError(
            "model.embeddings and model.attention_init initialize a T5 alone; leave them at normal"
        )
    if data is not None and config.embeddings == "cooccurrence":
        start_from_cooccurrence(model, data.train)
    if config.attention_init != "normal":
        matching = config.attention_init == "matching"
        start_attention(model, matching=matching, seed=experiment.training.seeds[0])
