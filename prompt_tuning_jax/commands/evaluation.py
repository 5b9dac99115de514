"""Scores prompts, and predicts with them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from prompt_tuning_jax import build, distributed, task_data
from prompt_tuning_jax.data.metrics import best_of
from prompt_tuning_jax.data.task import Source, Task
from prompt_tuning_jax.data.text_template import parse_template
from prompt_tuning_jax.data.tokenize import tokenize
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.experiment import Experiment
from prompt_tuning_jax.methods import PromptDesign
from prompt_tuning_jax.models.t5 import T5
from prompt_tuning_jax.opened_prompts import OpenedPrompts, open_prompts
from prompt_tuning_jax.pretraining import TextData
from prompt_tuning_jax.training.evaluate import Predictions
from prompt_tuning_jax.typing import HostArray


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Metrics in percent: of each prompt, their mean, the best one's, and the majority vote's.

    ``title`` says what was scored: the split, or the user's own file.
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


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """For one input: the (majority's) text, label log-probabilities of the mean, and votes."""

    prediction: str
    log_probs: dict[str, float] | None
    votes: dict[str, int] | None


def evaluate(
    experiment: Experiment, *, prompts: Sequence[str | HostArray], split: str | None = None
) -> EvalResult:
    """Scores prompts one by one and their majority vote, with one frozen model.

    ``prompts`` are prompt files, runs' folders (their best members) or arrays ``[P, D]``; none is
    the bare model.  ``split`` is ``data.eval_split`` unless given.  Prompt design has a member for
    each of ``training.seeds``, which read other demonstrations, one after another.
    """
    model = build.build_model(experiment)
    loaded = _opened(experiment, model, prompts)
    own = experiment.data
    if (own.train or own.eval) and loaded.labels and not own.labels:
        # What the prompts were trained to choose between; the training file may be gone by now.
        own = dataclasses.replace(own, labels=loaded.labels)
        experiment = dataclasses.replace(experiment, data=own)
    scores: list[dict[str, float]] = []
    predictions: dict[str, list[Predictions]] = {}
    reports: dict[str, None] = {}
    draws = task_data.draws_of(experiment)
    several = len(draws) * sum(members.number for members in loaded.groups) > 1
    data = _examples(draws[0], model, split=split)
    # Now, and not after the last prompt.
    direction = data.require_direction() if several else data.direction or "max"
    for number, own_draw in enumerate(draws):
        data = _examples(own_draw, model, split=split) if number else data
        reports |= dict.fromkeys(data.reports)
        for members in loaded.groups:
            theirs, found = build.evaluate_members(own_draw, members, members.tuned, data, model)
            scores += theirs
            for task, part in found.items():
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
        title=first.task.source.titles.get(split, split),
        predictions=joined,
        reports=tuple(reports),
    )


def predict(
    experiment: Experiment, *, prompts: Sequence[str], inputs: Sequence[str]
) -> list[Prediction]:
    """Predicts for bare texts: the task's wording is put around them.

    That of a user's own files is ``data.inputs_template`` where it names one column; with several
    columns the texts are inputs as they are.
    """
    distributed.require_same("the input", "\n".join(inputs))
    model = build.build_model(experiment)
    words = build.vocabulary_of(model)
    loaded = _opened(experiment, model, prompts)
    ranks = experiment.evaluation.strategy in ("rank", "auto")
    # Asking the experiment for them reads its training file, which need not be here any more.
    labels = loaded.labels or (_labels_of(experiment) if ranks else ())
    wording = _wording_of(experiment)
    task = _texts_as_task([wording(text) for text in inputs])
    if ranks and not labels:
        experiment = dataclasses.replace(
            experiment, evaluation=dataclasses.replace(experiment.evaluation, strategy="greedy")
        )
    source = None
    if isinstance(experiment.method, PromptDesign):
        source = task_data.build_mixture(experiment.data).tasks[0]
    parts = []
    for own_draw in task_data.draws_of(experiment):
        examples = tokenize(
            task_data.designed(own_draw, task, words, source=source),
            "predict",
            words,
            inputs_length=experiment.data.inputs_length,
            targets_length=experiment.data.targets_length,
            use_cache=False,
        )
        for members in loaded.groups:
            predictor = build.build_predictor(experiment, members.graphdef, words, labels=labels)
            parts.append(
                predictor.predict(
                    members.tuned,
                    members.frozen,
                    examples,
                    members=members.number,
                    task=members.task_number(experiment.data.task),
                )
            )
    predictions = Predictions.joined(parts)
    return [
        Prediction(
            prediction=vote.prediction,
            log_probs=_mean_log_probs([known[i] for known in predictions.log_probs_EN]),
            votes=dict(vote.votes) if len(predictions.texts_EN) > 1 else None,
        )
        for i, vote in enumerate(predictions.votes())
    ]


def _examples(experiment: Experiment, model: T5, *, split: str | None) -> task_data.TaskData:
    """What is evaluated on; the same for all processes."""
    data = task_data.build_data(
        experiment,
        build.vocabulary_of(model),
        split=split,
        training=False,
        layout=build.layout_of(experiment),
    )
    if isinstance(data, TextData):
        raise UserError("eval scores tasks; a text objective's loss is in the run's metrics")
    # Other examples there would be other batches, or one too many to wait for.
    distributed.require_same("the data", " ".join(d.digest() for d in data.evaluation.values()))
    return data


def _opened(experiment: Experiment, model: T5, prompts: Sequence[str | HostArray]) -> OpenedPrompts:
    """The prompts, or the bare model; where demonstrations are drawn it has a name for each."""
    if not isinstance(experiment.method, PromptDesign):
        return open_prompts(experiment, model, prompts)
    if prompts:
        raise UserError(
            "method=prompt_design puts words before the inputs of the bare model; leave out "
            "--prompt, or the method"
        )
    bare = open_prompts(experiment, model, [])
    if not experiment.method.shots:
        return dataclasses.replace(bare, names=("no demonstrations",))
    seeds = experiment.training.seeds
    return dataclasses.replace(bare, names=tuple(f"demonstrations of seed {s}" for s in seeds))


def _labels_of(experiment: Experiment) -> tuple[str, ...]:
    mixture = task_data.build_mixture(experiment.data)
    return tuple(dict.fromkeys(label for task in mixture.tasks for label in task.labels))


def _wording_of(experiment: Experiment) -> Callable[[str], str]:
    """Bare text -> inputs."""
    data = experiment.data
    if data.train or data.eval:
        if not data.inputs_template:
            return str
        template = parse_template(data.inputs_template, field="data.inputs_template")
        if len(template.columns) != 1:
            return str
        return lambda text: template.render({template.columns[0]: text})
    return task_data.build_mixture(data).tasks[0].from_text or str


def _texts_as_task(inputs: Sequence[str]) -> Task:
    rows = [{"inputs": text, "targets": ""} for text in inputs]
    source = Source(
        splits=("predict",), rows=lambda split, data_dir: rows, fingerprint=lambda split, _: ""
    )
    return Task(name="inputs", source=source)


def _mean_log_probs(known_E: Sequence[Mapping[str, float]]) -> dict[str, float] | None:
    """Each text's log-probability, averaged over the members that know it."""
    texts = dict.fromkeys(text for known in known_E for text in known)
    return {
        text: float(np.mean([known[text] for known in known_E if text in known])) for text in texts
    }
