"""Runs an ablation: trains the points of a grid, several at once, and keeps their scores.

Each run's folder also holds its scores in ``point.json``.  An interrupted ablation resumes where it
stopped: finished runs are not trained or evaluated again, and the interrupted one resumes from its
last checkpoint.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints import run_folder
from prompt_tuning_jax.checkpoints.run_folder import workdir_of
from prompt_tuning_jax.config.config_file import RUN_CONFIG
from prompt_tuning_jax.config.experiment import Data, Experiment
from prompt_tuning_jax.config.methods import split_init
from prompt_tuning_jax.config.overrides import to_dict
from prompt_tuning_jax.config.validation import validate
from prompt_tuning_jax.data.batching import task_data
from prompt_tuning_jax.data.tasks.metrics import best_of
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.ensemble import majority_vote
from prompt_tuning_jax.inference.evaluation import EvalResult, evaluate
from prompt_tuning_jax.inference.predictor import Predictions
from prompt_tuning_jax.inference.setup import (
    build_model,
    model_fingerprint,
    shared_model,
    vocabulary_of,
)
from prompt_tuning_jax.methods import PromptDesign, method_name
from prompt_tuning_jax.studies.ablations.axes import rates_of, with_shots
from prompt_tuning_jax.studies.ablations.cost import step_cost_of
from prompt_tuning_jax.studies.ablations.grid import Grid, Group
from prompt_tuning_jax.studies.ablations.results import Cell, Results, lines_of, task_title, write
from prompt_tuning_jax.studies.suite import data_of, say
from prompt_tuning_jax.training.resume import claim, require_place, require_run
from prompt_tuning_jax.training.run import RunResult, train
from prompt_tuning_jax.untrusted_input import read_json_file

POINT = "point.json"
DATA = "data.json"
_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
_SHOTS = (2, 4, 8)  # to choose from with a search


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How an ablation is run.

    Attributes:
      at_once: the largest number of members of a run; 0: as many as the device holds.
      test: data that the best checkpoints are scored on; None: the scores of the validation
        split that chose them.
      search: whether the first seed chooses each method's learning rate on the validation split
        (for prompt design, all seeds choose the number of demonstrations).
      measure: whether to measure the time and memory of a step.
    """

    at_once: int = 0
    test: Data | None = None
    search: bool = False
    measure: bool = False
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True, kw_only=True)
class AblationResult:
    """The table as Markdown lines, the written files, and the signal that stopped it, or 0."""

    results: Results | None
    files: tuple[Path, ...]
    stopped_by: int


def ablate(
    experiment: Experiment, grid: Grid, settings: Settings | None = None, *, quiet: bool = False
) -> AblationResult:
    """Trains and scores all points of a grid, and writes a figure, a table and JSON.

    ``experiment`` describes every run; its seeds are those of each point.  Runs are in folders of
    ``training.workdir``, and the results in ``NAME.png``, ``.md`` and ``.json`` there, which are
    written again after each run.  Raises UserError before any training if a point is invalid or
    data is missing.
    """
    settings = settings or Settings()
    for axis in (grid.axis, grid.line_axis):
        if settings.search and axis and axis.name.rpartition(".")[2] == "learning_rate":
            raise UserError("--search chooses the learning rate, which varies already; drop one")
    root = workdir_of(experiment)
    require_place(root)
    groups = [
        in_folder(group, root)
        for group in grid.groups(experiment, experiment.training.seeds, at_once=settings.at_once)
    ]
    check(groups, settings)
    suffix = f"_by_{grid.line_axis.name}" if grid.line_axis is not None else ""
    stem = root / f"{grid.axis.name}{suffix}"
    kept: list[tuple[Group, dict[str, Any]]] = []
    results: Results | None = None
    files: tuple[Path, ...] = ()
    number = len(grid.values) * len(grid.all_lines)
    pending, done = list(groups), 0
    with shared_model():
        while pending:
            group = pending.pop(0)
            say(quiet, f"\n{group.name}: {len(group.points)} at once; {done} runs are done")
            try:
                stopped_by, point = score_group(group, settings, quiet=quiet)
            except jax.errors.JaxRuntimeError as error:
                if _OUT_OF_MEMORY not in str(error) or len(group.points) < 2:
                    raise
                say(quiet, f"{group.name}: the device cannot hold all; training half at a time")
                pending[:0] = halves = [in_folder(half, root) for half in group.halves()]
                settings = dataclasses.replace(settings, at_once=len(halves[0].points))
                continue
            if stopped_by:
                return AblationResult(results=results, files=files, stopped_by=stopped_by)
            done += 1
            kept.append((group, point))
            results = _results(experiment, grid, kept, settings, number)
            if results.cells:
                files = write(results, stem)
    if results is not None:
        say(quiet, "", *lines_of(results), "", *(f"written: {file}" for file in files))
    return AblationResult(results=results, files=files, stopped_by=0)


def tested_on(of: Experiment, settings: Settings) -> Experiment:
    """Returns the experiment on the data whose scores the study reports."""
    return of if settings.test is None else _tested(of, settings.test)


def in_folder(group: Group, root: Path) -> Group:
    """Returns the group with its folder in ``root`` as the run's working directory."""
    return dataclasses.replace(
        group,
        experiment=_with_training(group.experiment, workdir=str(root / group.name)),
        whole=group.whole and in_folder(group.whole, root),
    )


def check(groups: Sequence[Group], settings: Settings) -> None:
    """Raises UserError for data that is missing, and for folders with other runs."""
    for group in groups:
        of = group.experiment
        data_of(of)
        if settings.test is not None:
            data_of(_tested(of, settings.test), training=False)
        folder = workdir_of(of)
        if (folder / RUN_CONFIG).is_file() and not settings.search:
            require_run(folder, of, exactly=True)


def _tested(of: Experiment, test: Data) -> Experiment:
    """Returns the experiment on the test data, with the lengths and wording of its own data."""
    data = dataclasses.replace(
        of.data, eval=test.eval, eval_split=test.eval_split, max_eval_examples=0
    )
    return validate(dataclasses.replace(of, data=data))


def claim_data(of: Experiment) -> None:
    """Claims the run's folder, and records the frozen model and the data there.

    Raises UserError if the folder has a run on others, even a finished one, which ``train`` does
    not read again.
    """
    folder = workdir_of(of)
    wanted = as_read({"model": model_fingerprint(build_model(of)), "data": data_of(of)})
    file = folder / DATA
    if file.is_file() and (folder / RUN_CONFIG).is_file() and read_json_file(file) != wanted:
        raise UserError(
            f"{folder} has a run on other data or weights; use another --workdir, or remove it"
        )
    claim(folder, of)
    run_folder.write_json(file, wanted)


def as_read(value: Any) -> Any:
    """Returns the value as JSON gives it back, with lists for tuples."""
    return json.loads(json.dumps(value))


def score_group(group: Group, settings: Settings, *, quiet: bool) -> tuple[int, dict[str, Any]]:
    """Trains and scores a group, unless its folder has the scores.

    Returns the number of the signal that stopped it, or 0, and the scores as JSON values.
    """
    of = group.experiment
    folder = workdir_of(of)
    wanted = as_read(
        {
            "experiment": to_dict(of),
            "test": None if settings.test is None else to_dict(_tested(of, settings.test).data),
            "search": settings.search,
            "data": data_of(of),
            "examples": data_of(tested_on(of, settings), training=False),
        }
    )
    if starts := digests_of(path for _, path in map(split_init, of.training.inits) if path):
        wanted["starts"] = starts
    file = folder / POINT
    model = build_model(of)
    if file.is_file():
        point: dict[str, Any] = read_json_file(file)
        own = isinstance(point, dict) and point.get("model") == model_fingerprint(model)
        if not own or point.get("settings") != wanted:
            raise UserError(
                f"{file} has the scores of other settings, data or weights; use another "
                f"--workdir, or remove {folder}"
            )
        if not settings.measure or not of.method.is_trainable or point.get("cost"):
            say(quiet, f"{folder}: done; its scores are kept in {POINT}")
            return 0, point
    started = time.monotonic()
    if of.method.is_trainable:
        stopped_by, scored = _trained(group, settings, quiet=quiet)
    else:
        stopped_by, scored = 0, _untrained(of, settings)
    if stopped_by:
        return stopped_by, {}
    point = {
        "settings": wanted,
        "model": model_fingerprint(model),
        "model_parameters": param_tree.count(param_tree.split(model)[1]),
        "seconds": time.monotonic() - started,
        "majority": majority_score(of, settings, model),
        **scored,
    }
    folder.mkdir(parents=True, exist_ok=True)
    run_folder.write_json(file, point)
    return 0, point


def digests_of(paths: Iterable[str | Path]) -> dict[str, str]:
    """Returns the SHA-256 digests of prompt files."""
    return {str(p): hashlib.sha256(Path(p).expanduser().read_bytes()).hexdigest() for p in paths}


def _trained(group: Group, settings: Settings, *, quiet: bool) -> tuple[int, dict[str, Any]]:
    of, chosen = group.experiment, ""
    folder = workdir_of(of)
    metric, direction = metric_of(of)
    rates = rates_of(of, method_name(of.method)) if settings.search else ()
    if rates:
        stopped_by, scores = _searched(group, rates, metric, settings, quiet=quiet)
        if stopped_by:
            return stopped_by, {}
        rate = rates[best_of(scores, direction)]
        chosen = f"rate {rate:g}"
        of = dataclasses.replace(
            of, optimizer=dataclasses.replace(of.optimizer, learning_rate=rate)
        )
        of = _with_training(of, workdir=str(folder / "seeds"))
    run = train(of, quiet=quiet)
    if not run.finished:
        return run.stopped_by, {}
    members: list[dict[str, Any]] = [
        {"validation": best.metrics[metric] if best else None, "step": best.step if best else None}
        for best in run.best
    ]
    found: dict[str, Any] = {
        "metric": metric,
        "direction": direction,
        "split": of.data.eval_split,
        "members": members,
        "chosen": chosen,
        "trained": sum(array[0].size for array in run.best_tuned.values()),
        "ensembles": {},
    }
    if settings.test is not None:
        tested = _tested(of, settings.test)
        result = evaluate(tested, prompts=[str(run.workdir)])
        found |= _scores_of(result, metric, group)
        found["members"] = [
            {**own, "test": scores[metric]}
            for own, scores in zip(members, result.per_prompt, strict=True)
        ]
    if settings.measure:
        found["cost"] = {**step_cost_of(of), "saved_bytes": _saved_bytes(run)}
    return 0, found


def _searched(
    group: Group, rates: tuple[float, ...], metric: str, settings: Settings, *, quiet: bool
) -> tuple[int, list[float]]:
    """Trains the first seed with each learning rate; parts of a group share the search.

    Returns the number of the signal that stopped it, or 0, and the validation scores.
    """
    of = (group.whole or group).experiment
    at_once = settings.at_once or len(rates)
    scores: list[float] = []
    for start in range(0, len(rates), at_once):
        tried = rates[start : start + at_once]
        name = "search" if tried == rates else f"search_{start}_to_{start + len(tried) - 1}"
        run = train(
            _with_training(
                of,
                seeds=of.training.seeds[:1] * len(tried),
                learning_rates=tried,
                inits=(),
                workdir=str(workdir_of(of) / name),
            ),
            quiet=quiet,
        )
        if not run.finished:
            return run.stopped_by, []
        scores += [best.metrics[metric] if best else float("nan") for best in run.best]
    return 0, scores


def _untrained(of: Experiment, settings: Settings) -> dict[str, Any]:
    """Scores the bare model, or demonstrations in front of the inputs."""
    chosen = ""
    metric, direction = metric_of(of)
    if isinstance(of.method, PromptDesign) and settings.search:
        # The lengths of its inputs are those for the shots of the config.
        bare = dataclasses.replace(
            of.data,
            inputs_length=(of.data.inputs_length - of.method.shots * of.data.targets_length)
            // (of.method.shots + 1),
        )
        plain = dataclasses.replace(of, data=bare)
        tried = [with_shots(plain, shots) for shots in _SHOTS]
        scores = [evaluate(one, prompts=[]).mean[metric] for one in tried]
        best = best_of(scores, direction)
        of, chosen = tried[best], f"{_SHOTS[best]} shots"
    number = len(of.training.seeds)
    if not of.method.composes_inputs:
        of = _with_training(of, seeds=of.training.seeds[:1])
    of = tested_on(of, settings)
    result = evaluate(of, prompts=[])
    scores = [each[metric] for each in result.per_prompt]
    return {
        "metric": metric,
        "direction": direction,
        "split": result.scored,
        "members": [{"validation": None, "test": score} for score in scores],
        "all_seeds": len(scores) == number,
        "chosen": chosen,
        "trained": 0,
        "ensembles": {},
    }


def _scores_of(result: EvalResult, metric: str, group: Group) -> dict[str, Any]:
    """Returns what was scored, and the votes' scores of the members of each cell."""
    cells: dict[str, list[int]] = {}
    for number, point in enumerate(group.points):
        cells.setdefault(_key(point.value, point.line), []).append(number)
    ensembles = {}
    for key, members in cells.items():
        if len(members) > 1:
            ensembles[key] = scores_of(result, partial(vote, members)).get(metric)
    return {"split": result.scored, "ensembles": ensembles}


def scores_of(result: EvalResult, answer: Callable[[Predictions, int], str]) -> dict[str, float]:
    """Returns the scores of ``answer`` (the predictions, an example's number) on all examples."""
    scores: dict[str, float] = {}
    for task, examples in result.examples.items():
        texts = [answer(result.predictions[task], n) for n in range(len(examples))]
        prefix = f"{task}/" if len(result.examples) > 1 else ""
        scores |= {f"{prefix}{name}": value for name, value in examples.score(texts).items()}
    return scores


def vote(members: Sequence[int], predictions: Predictions, example: int) -> str:
    """Returns what most of these members answer."""
    texts = [predictions.texts_EN[member][example] for member in members]
    known = [predictions.log_probs_EN[member][example] for member in members]
    return majority_vote(texts, known).prediction


def metric_of(of: Experiment) -> tuple[str, Any]:
    """Returns the metric that selects checkpoints, and its direction."""
    data = task_data.build_data(of, vocabulary_of(build_model(of)), training=False)
    return data.best_by, data.require_direction()


def majority_score(of: Experiment, settings: Settings, model: Any) -> float | None:
    """Returns the score of the most frequent target of the training split; None without labels."""
    words = vocabulary_of(model)
    of = dataclasses.replace(of, data=dataclasses.replace(of.data, max_train_examples=0))
    trained = task_data.build_data(of, words)
    tested = tested_on(of, settings)
    data = task_data.build_data(tested, words, training=False)
    if not data.labels or len(data.evaluation) != 1:
        return None
    (examples,) = data.evaluation.values()
    value = trained.majority_scores(examples).get(data.best_by)
    return None if value is None or not np.isfinite(value) else float(value)


def _results(
    experiment: Experiment,
    grid: Grid,
    kept: Sequence[tuple[Group, Mapping[str, Any]]],
    settings: Settings,
    number: int,
) -> Results:
    cells = []
    for value in grid.values:
        for line in grid.all_lines:
            found = [
                (point.seed, member, result)
                for group, result in kept
                for point, member in zip(group.points, _padded(group, result), strict=True)
                if point.value == value and point.line == line
            ]
            if len(found) < len(experiment.training.seeds):
                continue
            (_, _, first), *_ = found
            whole = all(result is first for _, _, result in found)
            if not first.get("all_seeds", True):
                found = found[:1]  # nothing is drawn, so all seeds are the same
            cells.append(
                Cell(
                    value=value,
                    line=line,
                    seeds=tuple(seed for seed, _, _ in found),
                    scores=tuple(_score(member, settings) for _, member, _ in found),
                    ensemble=first["ensembles"].get(_key(value, line)) if whole else None,
                    chosen=first["chosen"],
                    trained=first["trained"],
                    model_parameters=first["model_parameters"],
                    cost=first.get("cost"),
                )
            )
    _, first = kept[0]
    majority = {result["majority"] for _, result in kept}
    return Results(
        grid=grid,
        cells=tuple(cells),
        metric=", ".join(dict.fromkeys(result["metric"] for _, result in kept)),
        direction=first["direction"],
        split=first["split"],
        task=task_title(experiment.data),
        model=experiment.model.name_or_path,
        majority=majority.pop() if len(majority) == 1 else None,
        notes=_notes(experiment, settings),
        number=number,
    )


def _padded(group: Group, result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Returns a member for each point, where the bare model has one for all seeds."""
    members: list[Mapping[str, Any]] = list(result["members"])
    return members if len(members) > 1 else members * len(group.points)


def _score(member: Mapping[str, Any], settings: Settings) -> float:
    chosen = member["validation"] if settings.test is None else member["test"]
    value = member.get("test") if chosen is None else chosen
    return float("nan") if value is None else float(value)


def _notes(experiment: Experiment, settings: Settings) -> tuple[str, ...]:
    training = experiment.training
    what = "the best checkpoint of each, by this score, so it is a little optimistic"
    if settings.test is not None:
        what = "the checkpoint that was the best on the validation split"
    notes = [
        f"{training.steps:,} steps of {training.batch_size} examples; scores are of {what}.",
    ]
    if settings.search:
        notes.append("The first seed chose each learning rate on the validation split.")
    return (*notes, *settings.notes)


def _key(value: Any, line: Any) -> str:
    return f"{value} {line}"


def _saved_bytes(run: RunResult) -> int:
    """Returns the size of one member's file, or of its arrays if the run saves whole models."""
    for kind in (run_folder.PROMPTS, run_folder.TUNED):
        files = sorted((run.workdir / kind).glob("*.safetensors"))
        if files:
            return files[0].stat().st_size
    return sum(array[0].nbytes for array in run.best_tuned.values())


def _with_training(of: Experiment, **fields: Any) -> Experiment:
    return dataclasses.replace(of, training=dataclasses.replace(of.training, **fields))
