"""Scores prompts on a task, one by one and as an ensemble."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prompt_tuning_jax.checkpoints.prompt_file import generates_text, shared_labels, tasks_of
from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.config.validation import validate
from prompt_tuning_jax.data.batching import task_data
from prompt_tuning_jax.data.batching.tokenize import TokenizedExamples
from prompt_tuning_jax.data.tasks.files import FILE_TASK
from prompt_tuning_jax.data.tasks.metrics import best_of
from prompt_tuning_jax.data.tasks.selection import inputs_template_of
from prompt_tuning_jax.data.tasks.wording import AS_IT_IS, Wording, wording_of
from prompt_tuning_jax.distributed import processes
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.loading import LoadedPrompts, prompt_list
from prompt_tuning_jax.inference.prediction import Prompts, mean_log_probs, open_for
from prompt_tuning_jax.inference.predictor import Predictions, evaluate_members
from prompt_tuning_jax.inference.prompt_sources import as_texts
from prompt_tuning_jax.inference.setup import build_model, partitioner_of, vocabulary_of
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.models.vit.config import ViTConfig


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Metrics in percent for each prompt, their mean, the best prompt and the majority vote.

    ``title`` names what was scored: the split, or the user's file.  ``predictions`` and
    ``examples`` are keyed by task.
    """

    names: tuple[str, ...]
    per_prompt: list[dict[str, float]]
    mean: dict[str, float]
    best: dict[str, float]
    ensemble: dict[str, float] | None
    split: str
    title: str
    predictions: Mapping[str, Predictions]
    reports: tuple[str, ...]
    examples: Mapping[str, TokenizedExamples] = field(default_factory=dict)

    @property
    def scored(self) -> str:
        """What was scored in a word: the split, or the name of the user's file."""
        return Path(self.title).name


def evaluate(
    experiment: Experiment,
    *,
    prompts: Prompts = (),
    split: str | None = None,
    labels: Sequence[str] = (),
) -> EvalResult:
    """Scores prompts one by one and their majority vote, with one frozen model.

    ``prompts`` are one or several prompt files, run folders (for their best members) or arrays
    ``[P, D]``.  Without prompts the bare model is scored.  ``split`` defaults to
    ``data.eval_split``.  Prompt design has one member per seed in ``training.seeds``; the members
    use different demonstrations and are evaluated one after another.

    ``labels`` replace the labels that the prompts were trained on when scoring a user's files; the
    evaluation file never determines them.  Raises UserError if prompts have different labels.
    """
    labels = as_texts(labels, "labels")
    experiment = validate(experiment)
    if labels:
        with_labels = dataclasses.replace(experiment.data, labels=labels)
        experiment = validate(dataclasses.replace(experiment, data=with_labels))
    if experiment.data.objectives:
        raise UserError(
            "data.objectives: eval scores tasks; the loss on text is in the run's metrics.jsonl"
        )
    model = build_model(experiment)
    loaded = open_for(experiment, model, prompt_list(prompts))
    if not labels:
        experiment = _with_labels(experiment, loaded)
    if isinstance(model.config, ViTConfig) and not experiment.data.labels:
        # The bare model has classes of its own, where the data does not say which.
        with_labels = dataclasses.replace(experiment.data, labels=model.config.labels)
        experiment = dataclasses.replace(experiment, data=with_labels)
    scores: list[dict[str, float]] = []
    predictions: dict[str, list[Predictions]] = {}
    reports: dict[str, None] = {}
    draws = task_data.draws_of(experiment)
    several = len(draws) * sum(members.number for members in loaded.groups) > 1
    added = loaded.added_positions()
    data = _examples(draws[0], model, split=split, added=added)
    # Checked here, so that an error does not wait until after the last prompt.
    direction = data.require_direction() if several else data.direction or "max"
    for number, draw in enumerate(draws):
        if number:
            data = _examples(draw, model, split=split, added=added)
        reports |= dict.fromkeys([*data.reports, *_other_wordings(experiment, loaded)])
        for members in loaded.groups:
            member_scores, by_task = evaluate_members(draw, members, members.trainable, data)
            scores += member_scores
            for task, part in by_task.items():
                predictions.setdefault(task, []).append(part)
    joined = {task: Predictions.joined(parts) for task, parts in predictions.items()}
    metrics = list(scores[0])
    ensemble: dict[str, float] | None = None
    if len(scores) > 1:
        ensemble = {}
        for task, examples in data.evaluation.items():
            texts = [vote.prediction for vote in joined[task].votes()]
            prefix = f"{task}/" if len(data.evaluation) > 1 else ""
            values = examples.score(texts)
            ensemble.update({f"{prefix}{name}": value for name, value in values.items()})
    split = split or experiment.data.eval_split
    (first, *_) = data.evaluation.values()
    return EvalResult(
        names=loaded.names,
        per_prompt=scores,
        mean={name: float(np.mean([each[name] for each in scores])) for name in metrics},
        best=scores[best_of((each[data.best_by] for each in scores), direction)],
        ensemble=ensemble,
        split=split,
        title=first.task.source.display_names.get(split, split),
        predictions=joined,
        reports=tuple(reports),
        examples=data.evaluation,
    )


def _with_labels(experiment: Experiment, loaded: LoadedPrompts) -> Experiment:
    """Returns an experiment on a user's files with the labels that its prompts were trained on.

    The training file with the labels may no longer exist.
    """
    data = experiment.data
    if not (data.train or data.eval) or data.objectives:
        return experiment
    known = loaded.by_name()
    labels = shared_labels(
        {name: one.labels for name, one in known.items()},
        instead="say what all are scored by with labels (--set data.labels=a,b), or eval each "
        "by itself",
    )
    if data.labels:
        return experiment
    for name, one in known.items():
        if tasks := tasks_of(one):
            each = "; ".join(map(str, tasks))
            raise UserError(
                f"{name} was trained on {len(tasks)} tasks: say whose labels are meant with "
                f"--set data.labels=a,b ({each[:200]})"
            )
    if labels:
        data = dataclasses.replace(data, labels=labels)
    elif known and all(map(generates_text, known.values())) and data.targets == "auto":
        train = data.train if Path(data.train).exists() or not data.eval else ""
        data = dataclasses.replace(data, targets="text", train=train)
    elif data.train and data.eval and not Path(data.train).exists():
        # Without the training file the labels are unknown, and a later error asks for them.
        data = dataclasses.replace(data, train="")
    return dataclasses.replace(experiment, data=data)


def _other_wordings(experiment: Experiment, loaded: LoadedPrompts) -> Iterator[str]:
    """Yields a note for each prompt whose run read or ranked the examples in a different way."""
    data = experiment.data
    for name, one in loaded.by_name().items():
        if one.chat and not data.chat:
            yield f"note: {name} was trained on chat messages; --set data.chat=true makes them"
        if one.normalize_length and not experiment.evaluation.normalize_length:
            yield (
                f"note: the run of {name} ranked labels by the mean log-probability of their "
                "tokens; --set evaluation.strategy=rank --set evaluation.normalize_length=true "
                "does so"
            )
    if not (data.train or data.eval) or data.objectives:
        return
    ours = Wording(template=inputs_template_of(data))
    for name, one in loaded.by_name().items():
        theirs = wording_of(one.task, one.inputs_template)
        if AS_IT_IS not in (ours, theirs) and theirs.key != ours.key:
            yield (
                f"note: {name} was trained with the template {theirs.shown!r}, and these inputs "
                f"have {ours.shown!r}; --set data.inputs_template changes it"
            )


def prediction_rows(result: EvalResult) -> Iterator[dict[str, Any]]:
    """Yields the prediction for each evaluated example as a JSON-compatible dictionary.

    ``correct`` follows the task's comparison of texts.  For several prompts ``prediction`` is their
    vote.  ``row`` holds the other columns of a user's file.
    """
    several_tasks = len(result.examples) > 1
    for name, examples in result.examples.items():
        predictions = result.predictions[name]
        task = examples.task
        votes = predictions.votes()
        compared = examples.as_written([vote.prediction for vote in votes])
        for i, (example, vote) in enumerate(zip(examples.texts, votes, strict=True)):
            known = [by_example[i] for by_example in predictions.log_probs_EN]
            row: dict[str, Any] = {"task": name} if several_tasks else {}
            row |= {
                "input": example["inputs"],
                "target": example["targets"],
                "prediction": vote.prediction,
                "correct": task.is_correct(example, compared[i]),
                "log_probs": mean_log_probs(known),
            }
            if len(known) > 1:
                row["votes"] = dict(vote.votes)
            row["prompts"] = [
                {"prompt": prompt, "prediction": texts[i], "log_probs": by_example}
                for prompt, texts, by_example in zip(
                    result.names, predictions.texts_EN, known, strict=True
                )
            ]
            others = {k: v for k, v in example.items() if k not in ("inputs", "targets")}
            if others and task.name.startswith(FILE_TASK):
                row["row"] = others
            yield row


def _examples(
    experiment: Experiment, model: Model, *, split: str | None, added: tuple[int, int]
) -> task_data.TaskData:
    """Returns the evaluation data, which must be the same on all processes.

    ``added`` are the prompts' ``LoadedPrompts.added_positions``.
    """
    positions, inside = added
    data = task_data.build_data(
        experiment,
        vocabulary_of(model),
        split=split,
        training=False,
        window=model.config.max_positions,
        prompt_positions=positions,
        has_prompt=inside > 0,
        partitioner=partitioner_of(experiment),
    )
    # With different examples, processes would run different batches, or wait for one forever.
    processes.require_same("the data", " ".join(d.digest() for d in data.evaluation.values()))
    return data
