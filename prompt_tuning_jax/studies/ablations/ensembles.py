"""Ensembles of one to M members: votes and mean probabilities, of prompts and of whole models.

Lester et al. 2021, section 6, vote over five prompts.  An ensemble of N models costs as many
forward passes as one of N prompts, and N times the memory of the weights.
"""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints import run_folder
from prompt_tuning_jax.checkpoints.run_folder import workdir_of
from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.config.overrides import to_dict
from prompt_tuning_jax.data.tasks.metrics import LOSS
from prompt_tuning_jax.data.tasks.task import NORMED
from prompt_tuning_jax.data.tasks.text_metrics import AUC_NAMES
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.evaluation import EvalResult, evaluate
from prompt_tuning_jax.inference.predictor import Predictions
from prompt_tuning_jax.inference.setup import build_model, shared_model
from prompt_tuning_jax.studies.ablations.axes import AXES, Axis, Value
from prompt_tuning_jax.studies.ablations.grid import Grid
from prompt_tuning_jax.studies.ablations.points import (
    Settings,
    as_read,
    claim_data,
    majority_score,
    metric_of,
    scores_of,
    tested_on,
    vote,
)
from prompt_tuning_jax.studies.ablations.results import Cell, Results, lines_of, task_title, write
from prompt_tuning_jax.studies.ablations.run import AblationResult, check, in_folder
from prompt_tuning_jax.studies.suite import data_of
from prompt_tuning_jax.training.resume import require_place
from prompt_tuning_jax.training.run import train
from prompt_tuning_jax.untrusted_input import read_json_file

SCORES = "ensembles.json"
_TITLES = {"prompt_tuning": "prompts", "full": "models"}


def ensembles(
    experiment: Experiment,
    methods: Sequence[Value],
    settings: Settings,
    *,
    quiet: bool = False,
) -> AblationResult:
    """Trains a member per seed with each method, and scores all ensembles of one to M of them.

    The score of N members is the mean over all subsets of N.  Writes ``ensemble.png``, ``.md`` and
    ``.json`` in ``training.workdir``.  Raises UserError for a method that trains nothing, and for
    fewer than two seeds.
    """
    root = workdir_of(experiment)
    require_place(root)
    seeds = experiment.training.seeds
    if len(seeds) < 2:
        raise UserError("an ensemble needs at least two --seeds")
    if settings.search or settings.measure:
        raise UserError("--search and --measure have no effect on ensemble; leave them out")
    by_method = Grid(axis=AXES["method"], values=tuple(methods))
    groups = [
        in_folder(group, root)
        for group in by_method.groups(experiment, seeds, at_once=settings.at_once)
    ]
    for group in groups:
        if not group.experiment.method.is_trainable:
            raise UserError(f"--lines {group.points[0].value}: this method trains nothing")
    check(groups, settings)
    metric, _ = metric_of(experiment)
    name = metric.rpartition("/")[2]
    if name in (LOSS, *AUC_NAMES) or name.startswith(NORMED):
        raise UserError(
            f"evaluation.best_by is {metric}, and ensembles are scored by their answers; set it to "
            "a metric of these, such as accuracy"
        )
    scores_by_method: dict[str, dict[str, list[list[float]]]] = {}
    trained: dict[str, int] = {}
    with shared_model():
        for method in methods:
            parts = [group for group in groups if group.points[0].value == method]
            stopped_by, scores, number = _scored(
                [one.experiment for one in parts], metric, settings, quiet=quiet
            )
            if stopped_by:
                return AblationResult(results=None, files=(), stopped_by=stopped_by)
            scores_by_method[method.name], trained[method.name] = scores["scores"], number
        model = build_model(experiment)
        majority = majority_score(experiment, settings, model)
        size = param_tree.count(param_tree.split(model)[1])
    results = _results(
        experiment,
        scores_by_method,
        trained,
        metric=metric,
        split=scores["split"],
        majority=majority,
        model_parameters=size,
    )
    files = write(results, root / "ensemble")
    if not quiet:
        print("", *lines_of(results), "", *(f"written: {file}" for file in files), sep="\n")
    return AblationResult(results=results, files=files, stopped_by=0)


def _scored(
    parts: Sequence[Experiment], metric: str, settings: Settings, *, quiet: bool
) -> tuple[int, dict[str, Any], int]:
    """Trains a method's members and scores all their subsets, unless the folder has the scores.

    Returns the number of the signal that stopped a run, or 0, the scores, and the number of trained
    parameters of a member.
    """
    runs = []
    for of in parts:
        claim_data(of, data_of(of))
        run = train(of, quiet=quiet)
        if not run.finished:
            return run.stopped_by, {}, 0
        runs.append(run)
    trained = sum(array[0].size for array in runs[0].best_tuned.values())
    tested = tested_on(parts[0], settings)
    file = runs[0].workdir / SCORES
    wanted = {
        "runs": [str(run.workdir) for run in runs],
        "data": to_dict(tested.data),
        "examples": data_of(tested, training=False),
    }
    if file.is_file():
        kept = read_json_file(file)
        if isinstance(kept, dict) and kept.get("of") == as_read(wanted):
            return 0, kept, trained
    result = evaluate(tested, prompts=[run.workdir for run in runs])
    scores = {"split": result.scored, "scores": subset_scores(result, metric)}
    run_folder.write_json(file, {"of": wanted, **scores})
    return 0, scores, trained


def subset_scores(result: EvalResult, metric: str) -> dict[str, list[list[float]]]:
    """Returns ``{way: [scores of all subsets of N members, for N from 1]}``.

    The mean of probabilities needs the probabilities of all labels, and is left out if the answers
    were generated.
    """
    members = range(len(result.per_prompt))
    ranked = all(
        len(known) > 1 and known.keys() == predictions.log_probs_EN[0][0].keys()
        for predictions in result.predictions.values()
        for by_example in predictions.log_probs_EN
        for known in by_example
    )
    ways = {"vote": vote} | ({"mean of probabilities": _most_probable} if ranked else {})
    return {
        way: [
            [
                scores_of(result, partial(answer, subset))[metric]
                for subset in itertools.combinations(members, number)
            ]
            for number in range(1, len(members) + 1)
        ]
        for way, answer in ways.items()
    }


def _most_probable(subset: Sequence[int], predictions: Predictions, example: int) -> str:
    """Returns the label with the largest mean of the members' probabilities of the labels."""
    labels = list(predictions.log_probs_EN[0][example])
    logits_EC = np.array(
        [[predictions.log_probs_EN[e][example][label] for label in labels] for e in subset]
    )
    logits_EC -= logits_EC.max(axis=1, keepdims=True)
    shares_EC = np.exp(logits_EC)
    mean_C = (shares_EC / shares_EC.sum(axis=1, keepdims=True)).mean(axis=0)
    return labels[int(mean_C.argmax())]


def _results(
    experiment: Experiment,
    scores_by_method: Mapping[str, Mapping[str, Sequence[Sequence[float]]]],
    trained: Mapping[str, int],
    *,
    metric: str,
    split: str,
    majority: float | None,
    model_parameters: int,
) -> Results:
    numbers = range(1, len(experiment.training.seeds) + 1)
    values = tuple(Value(name=str(number)) for number in numbers)
    lines = {
        Value(name=f"{_TITLES.get(method, method)}: {way}"): (method, scores)
        for method, by_way in scores_by_method.items()
        for way, scores in by_way.items()
    }
    grid = Grid(
        axis=Axis(name="ensemble", title="members of the ensemble", apply=_same, scale="steps"),
        values=values,
        line_axis=Axis(
            name="combination", title="members: combined by", apply=_same, scale="names"
        ),
        lines=tuple(lines),
    )
    cells = [
        Cell(
            value=value,
            line=line,
            seeds=experiment.training.seeds,
            scores=tuple(scores[number - 1]),
            trained=number * trained[method],
            model_parameters=model_parameters,
        )
        for number, value in zip(numbers, values, strict=True)
        for line, (method, scores) in lines.items()
    ]
    sizes = ", ".join(
        f"{_TITLES.get(method, method)} {number:,}" for method, number in trained.items()
    )
    data = experiment.data
    return Results(
        grid=grid,
        cells=tuple(cells),
        metric=metric,
        split=split,
        task=task_title(data),
        model=experiment.model.name_or_path,
        majority=majority,
        notes=(
            f"{experiment.training.steps:,} steps of {experiment.training.batch_size} examples.  "
            "N members cost N forward passes, whatever they are; parameters to keep per member: "
            f"{sizes}.",
            "The subsets overlap, so their deviation understates that of new seeds.",
        ),
        number=len(cells),
        over=f"over all subsets of {len(experiment.training.seeds)} members",
    )


def _same(experiment: Experiment, value: Value) -> Experiment:
    del value
    return experiment
