"""One training run from its Experiment: what ``prompt-tuning train`` does."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.prompt_file import PromptMetadata
from prompt_tuning_jax.checkpoints.tuned_checkpoint import TunedCheckpoint
from prompt_tuning_jax.compilation import CompiledAhead
from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.config.overrides import method_to_json, to_json
from prompt_tuning_jax.config.paths import with_whole_paths
from prompt_tuning_jax.config.validation import validate
from prompt_tuning_jax.data.tasks.metrics import LOSS
from prompt_tuning_jax.distributed import processes
from prompt_tuning_jax.errors import UserError, printable
from prompt_tuning_jax.methods import (
    PROMPT,
    Method,
    NoTuning,
    PromptDesign,
    PromptTuning,
    method_name,
)
from prompt_tuning_jax.models.quantization import SCALE, Quantization, bytes_of
from prompt_tuning_jax.pretraining.mimetic_init import start_attention
from prompt_tuning_jax.pretraining.probes import Probe
from prompt_tuning_jax.pretraining.text_data import TextData, start_from_cooccurrence, text_losses
from prompt_tuning_jax.storage import remove_leftovers
from prompt_tuning_jax.training import build, run_folder, task_data
from prompt_tuning_jax.training.curves import plot_curves
from prompt_tuning_jax.training.logging import METRICS_FILE
from prompt_tuning_jax.training.loop import Best, Loop
from prompt_tuning_jax.typing import FlatParams, HostArray
from prompt_tuning_jax.untrusted_input import json_text


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """A run's members by name: best evaluation, and the tuned arrays then (leading axis E).

    ``stopped_by`` is the number of the signal that stopped it before its end, or 0;
    ``stopped_early``: it is finished for ``training.patience``, before its last step.
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
    """Trains what the experiment says in its working directory, or goes on where it stopped.

    Raises UserError for wrong input, before anything is written where that can be known.  Of
    several processes all must call; the first one writes and speaks.
    """
    experiment = with_whole_paths(validate(experiment))
    require_trains(experiment.method)
    folder = build.workdir_of(experiment)
    processes.require_same("the experiment", to_json(experiment))
    quiet = quiet or not processes.is_primary()
    run_folder.require_place(folder)
    if folder.is_dir():
        present = run_folder.require_run(folder, experiment)
        results = run_folder.read_results(folder)
        if present is not None and results is not None:
            same_patience = present.training.patience == experiment.training.patience
            if results.step >= experiment.training.steps or (
                results.stopped_early and same_patience
            ):
                return _finished(folder, experiment, results, quiet=quiet)
    task_data.check_files(experiment)
    partitioner = build.train_partitioner(experiment)
    model = build.build_model(experiment, partitioner=partitioner)
    data = task_data.build_data(experiment, build.vocabulary_of(model), partitioner=partitioner)
    if experiment.model.random_weights and experiment.model.embeddings == "cooccurrence":
        if not isinstance(data, TextData):
            raise UserError("model.embeddings=cooccurrence needs text; set data.objectives")
        start_from_cooccurrence(model, data.train)
    if experiment.model.random_weights and experiment.model.attention != "normal":
        matching = experiment.model.attention == "matching"
        start_attention(model, matching=matching, seed=experiment.training.seeds[0])
    fingerprint = build.model_fingerprint(model)
    digests = _digests(data)
    processes.require_same("the frozen model", fingerprint)
    processes.require_same("the data", " ".join(digests.values()))
    members = build.attach_members(experiment, model, labels=data.labels, partitioner=partitioner)
    state, step, learning_rates = build.build_step(experiment, members)
    names = build.member_names(experiment)
    _claim(folder, experiment)
    # A step that is no jitted function has nothing to compile.
    if (
        isinstance(data, task_data.TaskData)
        and partitioner.is_single_device
        and hasattr(step, "lower")
    ):
        step = CompiledAhead(step, data.one_of_each_shape(experiment.training.steps))
    if not quiet:
        for line in _introduction(experiment, members, data):
            print(printable(line), flush=True)

    probes = [Probe(spec, experiment, model) for spec in experiment.data.probes]

    def evaluate(trainable: FlatParams) -> list[dict[str, float]]:
        if isinstance(data, TextData):
            scores = text_losses(members.graphdef, trainable, members.frozen, data, partitioner)
            for member, own in enumerate(scores):
                weights = {**members.frozen, **{name: x[member] for name, x in trainable.items()}}
                own.update({f"probe_{probe.name}": probe.score(weights) for probe in probes})
            return scores
        return build.evaluate_members(
            experiment, members, trainable, data, model, scores_alone=True
        )[0]

    def on_best(improved: list[int], trainable: Mapping[str, HostArray], bests: list[Best]) -> None:
        # Where all trains, a file of it would be a checkpoint again.
        if not members.frozen or not processes.is_primary():
            return
        for member, best in zip(improved, bests, strict=True):
            own = {name: jnp.asarray(array[member]) for name, array in trainable.items()}
            method, kept = _folded(experiment, members, own)
            metadata = _metadata(
                experiment,
                method,
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
        batches=lambda start, stop: task_data.sharded_batches(data, partitioner, start, stop),
        evaluate=evaluate,
        on_best=on_best,
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
        microbatching=build.microbatching_of(experiment, members, partitioner),
        padding=data.train.padding if isinstance(data, task_data.TaskData) and data.train else None,
        quiet=quiet,
    ).run(state)
    run = RunResult(
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
        _finish(run, data, quiet=quiet)
    return run


def require_trains(method: Method) -> None:
    """UserError for a method of which nothing trains."""
    if isinstance(method, NoTuning | PromptDesign):
        raise UserError(
            f"method={method_name(method)} trains nothing; choose another method, or eval without "
            "prompts"
        )


def _claim(folder: Path, experiment: Experiment) -> None:
    """Makes the folder this run's; UserError where it is another's, or other hosts do not see it.

    The first process writes: the others would find what is not there yet, and write as well.
    """
    processes.primary_first(lambda: run_folder.claim(folder, experiment), "claim of the folder")
    if not run_folder.is_run(folder):
        raise UserError(
            f"{folder} was made by process 0 and is not there for this one: all processes need "
            "the same training.workdir, on a file system that all hosts see"
        )
    run_folder.claim(folder, experiment)


def _digests(data: task_data.TaskData | TextData) -> dict[str, str]:
    """What is trained and evaluated on -> a digest of all that decides its examples' scores.

    Of contents: files may move, and be written anew, as long as they say the same.
    """
    parts: dict[str, list[bytes | memoryview]] = {"training data": [], "evaluation data": []}
    if isinstance(data, TextData):
        for name, corpus in zip(parts, (data.train, data.evaluation), strict=True):
            parts[name] = [np.ascontiguousarray(corpus.tokens).data]
    else:
        if data.train is not None:
            parts["training data"] = [data.train.digest().encode(), repr(data.labels).encode()]
        for examples in data.evaluation.values():
            # Metrics compare texts, of which several may have the same tokens.
            parts["evaluation data"] += [
                examples.digest().encode(),
                repr(examples.task.labels).encode(),
                json_text(examples.texts).encode(),
            ]
    found = {}
    for name, each in parts.items():
        digest = hashlib.sha256()
        for part in each:
            digest.update(part)
        found[name] = digest.hexdigest()
    return found


def _introduction(
    experiment: Experiment, members: build.Members, data: task_data.TaskData | TextData
) -> Iterator[str]:
    """What trains, on what."""
    trained = param_tree.count(members.trainable) // members.number
    frozen = param_tree.count(
        param_tree.select(members.frozen, lambda name: not name.endswith(SCALE))
    )
    count = f"{members.number} x " if members.number > 1 else ""
    yield (
        f"{experiment.model.name_or_path}: {count}{trained:,} parameters train, "
        f"{frozen:,} are frozen{_held(members.frozen, frozen, experiment.model.quantization)}"
    )
    training, optimizer = experiment.training, experiment.optimizer
    rates = training.learning_rates or (optimizer.learning_rate,)
    schedule = "" if optimizer.schedule == "constant" else f", {optimizer.schedule}"
    yield (
        f"{method_name(experiment.method)} by {optimizer.name} at "
        f"{', '.join(f'{rate:g}' for rate in rates)}{schedule}"
    )
    yield from data.reports
    if isinstance(data, task_data.TaskData) and data.train is not None:
        examples = data.train.examples_per_epoch
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


def _finished(
    folder: Path, experiment: Experiment, results: run_folder.Results, *, quiet: bool
) -> RunResult:
    """What a run that has come to its end left, without its model and its data."""
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
        names=build.member_names(experiment),
        step=results.step,
        finished=True,
        stopped_by=0,
        stopped_early=results.stopped_early,
        best=run_folder.best_evaluations(folder),
        best_tuned=run_folder.read_best(folder),
    )


def _held(params: FlatParams, number: int, quantization: Quantization) -> str:
    """What so many parameters take, scales included."""
    if not number:
        return ""
    size = bytes_of(params)
    kind = "" if quantization == "none" else f" in {quantization}"
    return f"{kind} ({size / 1e6:,.1f} MB, {size / number:.2f} bytes each)"


def _folded(
    experiment: Experiment, members: build.Members, own: FlatParams
) -> tuple[Method, dict[str, HostArray]]:
    """What of one member's tuned arrays is kept, and the method that it then is."""
    method = experiment.method
    attached = param_tree.merge(members.graphdef, {**members.frozen, **own})
    method, attached = method.for_inference(attached)
    params = param_tree.split(attached)[1]
    return method, {name: np.asarray(p) for name, p in params.items() if method.trains(name)}


def _metadata(
    experiment: Experiment,
    method: Method,
    member: int,
    best: Best,
    *,
    fingerprint: str,
    best_by: str,
    labels: tuple[str, ...],
) -> PromptMetadata:
    training = experiment.training
    init = getattr(experiment.method, "init", "")
    placement = method.placement if isinstance(method, PromptTuning) else ""
    return PromptMetadata(
        model_fingerprint=fingerprint,
        model_name=experiment.model.name_or_path,
        task=experiment.data.train or experiment.data.task,
        init=training.inits[member] if training.inits else init,
        seed=training.seeds[member],
        steps=best.step,
        metric=best_by,
        score=best.metrics[best_by] if math.isfinite(best.metrics[best_by]) else None,
        labels=labels,
        inputs_template=task_data.inputs_template_of(experiment.data),
        mixture=task_data.mixture_of(experiment.data),
        combine=placement,
    )


def _finish(run: RunResult, data: task_data.TaskData | TextData, *, quiet: bool) -> None:
    """Writes results and curves, and says how it went."""
    if not run.finished:
        if not quiet:
            print(f"stopped and saved at step {run.step}; the same command goes on from there")
        return
    # Those of a kill while these very files were written.
    remove_leftovers(run.workdir)
    by_name = {
        name: {"step": best.step, **best.metrics}
        for name, best in zip(run.names, run.best, strict=True)
        if best is not None
    }
    baselines = {}
    if isinstance(data, task_data.TaskData) and len(data.evaluation) == 1 and data.labels:
        (examples,) = data.evaluation.values()
        scores = examples.task.majority_scores(examples.texts, data.train_targets)
        if data.best_by in scores:
            baselines["majority class"] = scores[data.best_by]
    plot_curves(
        run.workdir / METRICS_FILE,
        run.workdir / run_folder.CURVES,
        # Of a text the loss and the probes, whatever there is.
        metrics=() if isinstance(data, TextData) else (data.best_by,),
        directions={data.best_by: data.require_direction()},
        baselines=baselines,
        names=run.names,
    )
    # Last: they say that the run is finished.
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
