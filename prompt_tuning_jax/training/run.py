"""Runs one training run, from its experiment to its prompt files: ``prompt-tuning train``."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints import run_folder
from prompt_tuning_jax.checkpoints.prompt_file import PromptMetadata
from prompt_tuning_jax.checkpoints.run_folder import Best, member_names, workdir_of
from prompt_tuning_jax.checkpoints.tuned_checkpoint import TunedCheckpoint
from prompt_tuning_jax.compilation import CompiledAhead
from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.config.experiment import Model as ModelFields
from prompt_tuning_jax.config.methods import DeepPrompts, split_init
from prompt_tuning_jax.config.overrides import method_to_json, to_json
from prompt_tuning_jax.config.paths import with_whole_paths
from prompt_tuning_jax.config.validation import validate
from prompt_tuning_jax.data.batching import task_data
from prompt_tuning_jax.data.batching.task_data import TaskData
from prompt_tuning_jax.data.tasks.metrics import LOSS, Direction
from prompt_tuning_jax.data.tasks.selection import check_files, inputs_template_of, mixture_of
from prompt_tuning_jax.distributed import processes
from prompt_tuning_jax.distributed.sharding import Partitioner
from prompt_tuning_jax.errors import UserError, printable
from prompt_tuning_jax.inference.predictor import evaluate_members
from prompt_tuning_jax.inference.setup import (
    Members,
    attach_members,
    build_model,
    model_fingerprint,
    vocabulary_of,
)
from prompt_tuning_jax.methods import PROMPT, MethodConfig, method_name
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.models.config import ModelConfig
from prompt_tuning_jax.models.quantization import MINIMUM, SCALE, bytes_of
from prompt_tuning_jax.storage import remove_leftovers
from prompt_tuning_jax.training import build
from prompt_tuning_jax.training.curves import plot_curves
from prompt_tuning_jax.training.logging import METRICS_FILE
from prompt_tuning_jax.training.loop import Loop
from prompt_tuning_jax.training.resume import claim, require_place, require_run
from prompt_tuning_jax.training.samples import sample_texts
from prompt_tuning_jax.typing import Batch, FlatParams, HostArray


class TrainingData(Protocol):
    """The data that ``run`` trains on: ``TaskData``, or the text of ``pretraining``."""

    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def task_labels(self) -> tuple[tuple[str, ...], ...]: ...
    @property
    def best_by(self) -> str: ...
    @property
    def reports(self) -> tuple[str, ...]: ...
    @property
    def examples_per_epoch(self) -> int | None: ...
    @property
    def charted(self) -> tuple[str, ...]: ...
    def require_direction(self) -> Direction: ...
    def baselines(self) -> dict[str, float]: ...
    def digests(self) -> dict[str, str]: ...
    def empty_batches(self, steps: int) -> list[Batch]: ...
    def padding(self, start: int, stop: int) -> float | None: ...
    def batches(self, start: int, stop: int, partitioner: Partitioner) -> Iterator[Batch]: ...


# Maps the members and their trainable arrays to the metrics of each member.
Evaluate: TypeAlias = Callable[[Members, FlatParams], list[dict[str, float]]]
# Opens the data for a model, and may change the initial values of its random weights.
Prepare: TypeAlias = Callable[[Experiment, Model, Partitioner], tuple[TrainingData, Evaluate]]


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The best evaluation of each member of a run, and the trainable arrays at that step.

    Attributes:
      workdir: the run's working directory.
      names: the names of the members.
      step: the last completed step.
      finished: whether the run is finished; otherwise the same command resumes it.
      stopped_by: the number of the signal that stopped it, or 0.
      stopped_early: whether ``training.patience`` finished it before its last step.
      best: the best evaluation of each member, or None without any evaluation.
      best_tuned: the trainable arrays by path, with a leading axis E.
    """

    workdir: Path
    names: tuple[str, ...]
    step: int
    finished: bool
    stopped_by: int
    stopped_early: bool
    best: tuple[Best | None, ...]
    best_tuned: Mapping[str, HostArray]


def train(experiment: Experiment, *, quiet: bool = False) -> RunResult:
    """Trains on the experiment's tasks in its working directory, or resumes the run there.

    Raises UserError for invalid input, if possible before anything is written.  With several
    processes, all of them must call it; only process 0 writes and prints.
    """
    if needs_pretraining(experiment):
        raise UserError(
            "data.objectives, model.embeddings and model.attention_init are for pre-training: call "
            "pretrain (the command prompt-tuning train does)"
        )
    if any(experiment.method.description_shape()):
        raise UserError(
            f"method={method_name(experiment.method)} reads descriptions of classes in front of "
            "its inputs, which only data.objectives writes there: set data.objectives, or choose "
            "another method"
        )
    return run(experiment, _prepare_tasks, quiet=quiet)


def needs_pretraining(experiment: Experiment) -> bool:
    """Returns whether this experiment needs ``pretrain`` instead of ``train``."""
    model = experiment.model
    initialized = (model.embeddings, model.attention_init) != ("normal", "normal")
    return bool(experiment.data.objectives) or (model.random_weights and initialized)


def _prepare_tasks(
    experiment: Experiment, model: Model, partitioner: Partitioner
) -> tuple[TrainingData, Evaluate]:
    data = task_data.build_data(
        experiment,
        vocabulary_of(model),
        window=model.config.max_positions,
        partitioner=partitioner,
    )
    return data, TaskEvaluation(experiment, data)


class TaskEvaluation:
    """Evaluates the members on the tasks' data, and keeps samples of the last predictions."""

    def __init__(self, experiment: Experiment, data: TaskData) -> None:
        self._experiment, self._data = experiment, data
        self.samples: dict[str, str] = {}

    def __call__(self, members: Members, trainable: FlatParams) -> list[dict[str, float]]:
        """Returns the metrics of each member."""
        scores, predictions = evaluate_members(
            self._experiment, members, trainable, self._data, scores_alone=True
        )
        if processes.is_primary():
            self.samples = sample_texts(self._data.evaluation, predictions)
        return scores


def run(experiment: Experiment, prepare: Prepare, *, quiet: bool = False) -> RunResult:
    """Runs the training loop on the data that ``prepare`` opens; see ``train``."""
    experiment = with_whole_paths(validate(experiment))
    require_trains(experiment.method)
    folder = workdir_of(experiment)
    processes.require_same("the experiment", to_json(experiment))
    quiet = quiet or not processes.is_primary()
    require_place(folder)
    if folder.is_dir():
        try:
            present = require_run(folder, experiment)
        except UserError:
            check_files(experiment)  # a path that leads nowhere differs from the run's
            raise
        results = run_folder.read_results(folder)
        if present is not None and results is not None:
            same_patience = present.training.patience == experiment.training.patience
            if results.step >= experiment.training.steps or (
                results.stopped_early and same_patience
            ):
                return _finished(folder, experiment, results, quiet=quiet)
    check_files(experiment)
    partitioner = build.train_partitioner(experiment)
    model = build_model(experiment, partitioner=partitioner)
    data, evaluate = prepare(experiment, model, partitioner)
    fingerprint = model_fingerprint(model)
    digests = data.digests()
    processes.require_same("the frozen model", fingerprint)
    processes.require_same("the data", " ".join(digests.values()))
    members = attach_members(experiment, model, labels=data.labels, partitioner=partitioner)
    config, attention = model.config, model.attention
    del model  # its arrays are those of the members, which are stacked next
    members = build.with_stacked_layers(experiment, members, partitioner)
    state, step, learning_rates = build.build_step(
        experiment, members, task_labels=data.task_labels
    )
    names = member_names(experiment)
    shapes = data.empty_batches(experiment.training.steps)
    # Only a jitted function can be compiled ahead of time.
    if shapes and partitioner.is_single_device and hasattr(step, "lower"):
        step = CompiledAhead(step, shapes)
    if not quiet:
        lines = list(_introduction(experiment, members, data, config))
        if partitioner.mesh.devices.flat[0].platform != "cpu":  # which has one way
            lines.append(f"attention: {attention}")
        for line in lines:
            print(printable(line), flush=True)

    def on_best(improved: list[int], trainable: Mapping[str, HostArray], bests: list[Best]) -> None:
        # Without frozen parameters, the file would only repeat the checkpoint.
        if not members.frozen or not processes.is_primary():
            return
        for member, best in zip(improved, bests, strict=True):
            params = {name: jnp.asarray(array[member]) for name, array in trainable.items()}
            method, kept, model_config = _folded(members, params)
            metadata = _metadata(
                experiment,
                method,
                model_config,
                member,
                best,
                fingerprint=fingerprint,
                best_by=data.best_by,
                labels=data.labels,
            )
            if kept.keys() == {PROMPT}:
                run_folder.export_prompt(folder, names[member], kept[PROMPT], metadata)
                continue
            stored = TunedCheckpoint(
                trainable=kept,
                method=method_to_json(method),
                metadata=metadata,
                tasks=members.tasks,
            )
            run_folder.export_tuned(folder, names[member], stored)

    training = experiment.training
    result = Loop(
        train_step=step,
        frozen=members.frozen,
        batches=lambda start, stop: data.batches(start, stop, partitioner),
        evaluate=lambda trainable: evaluate(members, trainable),
        samples=lambda: evaluate.samples if isinstance(evaluate, TaskEvaluation) else {},
        on_best=on_best,
        on_start=lambda: _claim(folder, experiment),
        workdir=folder,
        fingerprint=fingerprint,
        data=digests,
        names=names,
        learning_rates=learning_rates,
        best_by=data.best_by,
        direction=data.require_direction(),
        steps=training.steps,
        eval_every=training.eval_every,
        save_every=training.save_every,
        log_every=training.log_every,
        batch_size=training.batch_size,
        patience=training.patience,
        padding=data.padding,
        quiet=quiet,
    ).run(state)
    done = RunResult(
        workdir=folder,
        names=names,
        step=result.step,
        finished=result.finished,
        stopped_by=result.stopped_by,
        stopped_early=result.stopped_early,
        best=result.best,
        best_tuned=result.best_tuned,
    )
    if processes.is_primary():
        _finish(done, data, quiet=quiet)
    return done


def require_trains(method: MethodConfig) -> None:
    """Raises UserError if the method has no trainable parameters."""
    if not method.is_trainable:
        raise UserError(
            f"method={method_name(method)} trains nothing; choose another method, or eval without "
            "prompts"
        )


def _claim(folder: Path, experiment: Experiment) -> None:
    """Claims the folder for this run.

    Process 0 writes first.  Otherwise all processes would see an empty folder, and all would write.
    Raises UserError if the folder belongs to another run, or if another host does not see it.
    """
    processes.primary_first(lambda: claim(folder, experiment), "claim of the folder")
    if not run_folder.is_run(folder):
        raise UserError(
            f"{folder} was made by process 0 and is not there for this one: all processes need "
            "the same training.workdir, on a file system that all hosts see"
        )
    claim(folder, experiment)


def _introduction(
    experiment: Experiment, members: Members, data: TrainingData, model_config: ModelConfig
) -> Iterator[str]:
    """Yields lines that describe the parameters, the optimizer and the data."""
    trained = param_tree.count(members.trainable) // members.number
    frozen = param_tree.count(
        param_tree.select(members.frozen, lambda name: not name.endswith((SCALE, MINIMUM)))
    )
    count = f"{members.number} x " if members.number > 1 else ""
    yield (
        f"{experiment.model.name_or_path}: {count}{trained:,} parameters train, "
        f"{frozen:,} are frozen{_held(members.frozen, frozen, experiment.model)}"
    )
    training, optimizer = experiment.training, experiment.optimizer
    rates = training.learning_rates or (optimizer.learning_rate,)
    schedule = "" if optimizer.schedule == "constant" else f", {optimizer.schedule}"
    yield (
        f"{method_name(experiment.method)} by {optimizer.name} at "
        f"{', '.join(f'{rate:g}' for rate in rates)}{schedule}"
    )
    yield from reach_warning(experiment, model_config)
    yield from data.reports
    if (examples := data.examples_per_epoch) is not None:
        epochs = training.steps * training.batch_size / examples
        yield (
            f"{training.steps:,} step{'s' * (training.steps != 1)} of {training.batch_size} "
            f"example{'s' * (training.batch_size != 1)}: "
            f"{f'{epochs:.1f}' if epochs >= 0.1 else f'{epochs:.1g}'} epochs"
        )
        if examples < training.batch_size:
            yield (
                f"note: a batch of {training.batch_size} is larger than the {examples} training "
                "examples: each batch repeats some of them"
            )


def reach_warning(experiment: Experiment, model_config: ModelConfig) -> Iterator[str]:
    """Yields a line if sliding windows hide the prompt from tokens at the end of long inputs."""
    reach = model_config.prompt_reach()
    longest, method = experiment.data.inputs_length, experiment.method
    # The last position of the prompt is n positions before the n-th token.
    short = [back for back in reach if 0 < back <= longest]
    if not short or not method.prompt_positions():
        return
    rest = len(reach) - len(short)
    where = f"in the other {rest} alone" if rest else "through the tokens in between alone"
    deep = "method=deep_prompts trains a prompt for each layer, and "
    yield (
        f"warning: {len(short)} of the encoder's {len(reach)} layers see {min(short)} positions "
        f"back, and inputs have up to {longest} tokens: those behind the first {min(short) - 1} "
        f"see the prompt {where}; {'' if isinstance(method, DeepPrompts) else deep}"
        "method=prefix_tuning is seen by all tokens in all layers"
    )


def _finished(
    folder: Path, experiment: Experiment, results: run_folder.Results, *, quiet: bool
) -> RunResult:
    """Reads the result of a finished run from its folder, without loading model or data."""
    if not quiet and results.stopped_early:
        print(
            f"{folder}: the run stopped early at step {results.step}, by training.patience="
            f"{experiment.training.patience}; nothing was changed; raise it, or set it to 0, to go "
            "on"
        )
    elif not quiet:
        print(f"{folder}: the run is finished at step {results.step}; nothing was changed")
    return RunResult(
        workdir=folder,
        names=member_names(experiment),
        step=results.step,
        finished=True,
        stopped_by=0,
        stopped_early=results.stopped_early,
        best=run_folder.best_evaluations(folder),
        best_tuned=run_folder.read_best(folder),
    )


def _held(params: FlatParams, number: int, model: ModelFields) -> str:
    """Formats the memory of ``number`` parameters, including the scales of quantization."""
    if not number:
        return ""
    size = bytes_of(params)
    kind = "" if model.quantization == "none" else f" in {model.quantization}"
    if model.weights == "quantized":
        kind = ", quantized as in the file"
    return f"{kind} ({size / 1e6:,.1f} MB, {size / number:.2f} bytes each)"


def _folded(
    members: Members, own: FlatParams
) -> tuple[MethodConfig, dict[str, HostArray], ModelConfig]:
    """Returns a member's method and arrays in the form for inference, which is the one to save.

    The last result is the configuration of the model.
    """
    tuned = param_tree.merge(members.graphdef, {**members.frozen, **own})
    tuned = tuned.for_inference()
    method, params = tuned.method.config, param_tree.split(tuned)[1]
    kept = {name: np.asarray(p) for name, p in params.items() if method.trains(name)}
    return method, kept, tuned.model.config


def _metadata(
    experiment: Experiment,
    method: MethodConfig,
    model_config: ModelConfig,
    member: int,
    best: Best,
    *,
    fingerprint: str,
    best_by: str,
    labels: tuple[str, ...],
) -> PromptMetadata:
    training = experiment.training
    init = getattr(experiment.method, "init", "")
    prompt = method.plain_prompt()
    embedding_scale = getattr(model_config, "embedding_scale", 1.0)
    return PromptMetadata(
        model_fingerprint=fingerprint,
        model_name=experiment.model.name_or_path,
        task=experiment.data.train or experiment.data.task,
        init=split_init(training.inits[member])[0] if training.inits else init,
        seed=training.seeds[member],
        steps=best.step,
        metric=best_by,
        score=best.metrics[best_by] if math.isfinite(best.metrics[best_by]) else None,
        labels=labels,
        inputs_template=inputs_template_of(experiment.data),
        chat=experiment.data.chat,
        normalize_length=experiment.evaluation.normalize_length,
        mixture=mixture_of(experiment.data),
        combine="" if prompt is None else prompt.placement,
        model_type=getattr(model_config, "model_type", ""),
        embedding_scale=None if embedding_scale == 1.0 else embedding_scale,
    )


def _finish(run: RunResult, data: TrainingData, *, quiet: bool) -> None:
    """Writes results and curves, and prints a summary."""
    if not run.finished:
        if not quiet:
            print(f"stopped and saved at step {run.step}; the same command resumes from there")
        return
    # Left behind if an earlier process was killed while it wrote the files below.
    remove_leftovers(run.workdir)
    by_name = {
        name: {"step": best.step, **best.metrics}
        for name, best in zip(run.names, run.best, strict=True)
        if best is not None
    }
    plot_curves(
        run.workdir / METRICS_FILE,
        run.workdir / run_folder.CURVES,
        metrics=data.charted,
        directions={data.best_by: data.require_direction()},
        baselines=data.baselines(),
        names=run.names,
    )
    # Written last, because they mark the run as finished.
    ended = {"step": run.step, "stopped_early": run.stopped_early}
    run_folder.write_json(run.workdir / run_folder.RESULTS, {"best": by_name, **ended})
    if quiet:
        return
    if run.stopped_early:
        print(f"stopped early at step {run.step}: no evaluation was better for training.patience")
    decimals = 4 if data.best_by.rsplit("/", maxsplit=1)[-1] == LOSS else 2
    for name, best in by_name.items():
        if math.isfinite(score := best[data.best_by]):
            print(f"{name}: best {data.best_by} {score:.{decimals}f} at step {best['step']}")
        else:
            print(
                f"note: {name}: {data.best_by} was nan at every evaluation, so that none is the "
                f"best; what is kept is of the last one, step {best['step']}"
            )
    print(f"curves: {run.workdir / run_folder.CURVES}")
