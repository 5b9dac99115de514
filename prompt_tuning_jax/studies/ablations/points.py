"""Trains and scores the runs of a study, and keeps their scores in their folders.

A run's scores are in ``point.json``.  A finished run is not trained or evaluated again, unless its
settings, data or weights are others, which is an error.
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
    vocabulary_of,
)
from prompt_tuning_jax.methods import PromptDesign, method_name
from prompt_tuning_jax.storage import expanded
from prompt_tuning_jax.studies.ablations.axes import rates_of, with_shots
from prompt_tuning_jax.studies.ablations.cost import step_cost_of
from prompt_tuning_jax.studies.ablations.grid import Group
from prompt_tuning_jax.studies.suite import data_of, say
from prompt_tuning_jax.training.resume import claim, run_identity
from prompt_tuning_jax.training.run import RunResult, train
from prompt_tuning_jax.untrusted_input import read_json_file

POINT = "point.json"
DATA = "data.json"
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


def score_group(group: Group, settings: Settings, *, quiet: bool) -> tuple[int, dict[str, Any]]:
    """Trains and scores a group, unless its folder has the scores.

    Returns the number of the signal that stopped it, or 0, and the scores as JSON values.
    """
    of = group.experiment
    folder = workdir_of(of)
    tested = tested_on(of, settings)
    wanted = as_read(
        {
            "experiment": to_dict(run_identity(of)),
            "test": None if settings.test is None else to_dict(run_identity(tested).data),
            "search": settings.search,
            "data": data_of(of),
            "examples": data_of(tested, training=False),
        }
    )
    starts = [path for _, path in map(split_init, of.training.inits) if path]
    starts.append(getattr(of.method, "init_path", ""))
    if digests := digests_of(path for path in starts if path and expanded(path).is_file()):
        wanted["starts"] = digests
    file = folder / POINT
    model = build_model(of)
    if file.is_file():
        point: dict[str, Any] = read_json_file(file)
        same_model = isinstance(point, dict) and point.get("model") == model_fingerprint(model)
        if not same_model or point.get("settings") != wanted:
            raise UserError(
                f"{file} has the scores of other settings, data or weights; use another "
                f"--workdir, or remove {folder}"
            )
        if not settings.measure or not of.method.is_trainable or point.get("cost"):
            say(quiet, f"{folder}: done; its scores are kept in {POINT}")
            return 0, point
    started = time.monotonic()
    if of.method.is_trainable:
        stopped_by, scored = _trained(group, settings, wanted["data"], quiet=quiet)
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


def _trained(
    group: Group, settings: Settings, data: Mapping[str, str], *, quiet: bool
) -> tuple[int, dict[str, Any]]:
    of, chosen = group.experiment, ""
    folder = workdir_of(of)
    metric, direction = metric_of(of)
    rates = rates_of(of, method_name(of.method)) if settings.search else ()
    if rates:
        stopped_by, scores = _searched(group, rates, metric, settings, data, quiet=quiet)
        if stopped_by:
            return stopped_by, {}
        rate = rates[best_of(scores, direction)]
        chosen = f"rate {rate:g}"
        of = dataclasses.replace(
            of, optimizer=dataclasses.replace(of.optimizer, learning_rate=rate)
        )
        of = with_training(of, workdir=str(folder / "seeds"))
    claim_data(of, data)
    run = train(of, quiet=quiet)
    if not run.finished:
        return run.stopped_by, {}
    members: list[dict[str, Any]] = [
        {"validation": best.metrics[metric] if best else None, "step": best.step if best else None}
        for best in run.best
    ]
    record: dict[str, Any] = {
        "metric": metric,
        "direction": direction,
        "split": of.data.eval_split,
        "members": members,
        "chosen": chosen,
        "trained": sum(array[0].size for array in run.best_tuned.values()),
        "ensembles": {},
    }
    if settings.test is not None:
        tested = tested_on(of, settings)
        result = evaluate(tested, prompts=[str(run.workdir)])
        record |= _scores_of(result, metric, group)
        record["members"] = [
            {**member, "test": scores[metric]}
            for member, scores in zip(members, result.per_prompt, strict=True)
        ]
    if settings.measure:
        record["cost"] = {**step_cost_of(of), "saved_bytes": _saved_bytes(run)}
    return 0, record


def _searched(
    group: Group,
    rates: tuple[float, ...],
    metric: str,
    settings: Settings,
    data: Mapping[str, str],
    *,
    quiet: bool,
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
        search = with_training(
            of,
            seeds=of.training.seeds[:1] * len(tried),
            learning_rates=tried,
            inits=(),
            workdir=str(workdir_of(of) / name),
        )
        claim_data(search, data)
        run = train(search, quiet=quiet)
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
        of = with_training(of, seeds=of.training.seeds[:1])
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
        cells.setdefault(cell_key(point.value, point.line), []).append(number)
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


def tested_on(of: Experiment, settings: Settings) -> Experiment:
    """Returns the experiment on the data whose scores the study reports.

    Lengths and wording are those of its own data.
    """
    test = settings.test
    if test is None:
        return of
    data = dataclasses.replace(
        of.data, eval=test.eval, eval_split=test.eval_split, max_eval_examples=0
    )
    return validate(dataclasses.replace(of, data=data))


def claim_data(of: Experiment, data: Mapping[str, str]) -> None:
    """Claims the run's folder, and records the frozen model and the data's digests there.

    Raises UserError if the folder has a run on others, even a finished one, which ``train`` does
    not read again.
    """
    folder = workdir_of(of)
    wanted = as_read({"model": model_fingerprint(build_model(of)), "data": data})
    file = folder / DATA
    if file.is_file() and (folder / RUN_CONFIG).is_file() and read_json_file(file) != wanted:
        raise UserError(
            f"{folder} has a run on other data or weights; use another --workdir, or remove it"
        )
    claim(folder, of)
    run_folder.write_json(file, wanted)


def digests_of(paths: Iterable[str | Path]) -> dict[str, str]:
    """Returns the SHA-256 digests of prompt files."""
    return {str(p): hashlib.sha256(expanded(p).read_bytes()).hexdigest() for p in paths}


def as_read(value: Any) -> Any:
    """Returns the value as JSON gives it back, with lists for tuples."""
    return json.loads(json.dumps(value))


def cell_key(value: Any, line: Any) -> str:
    """Returns the name of a cell of the table in ``point.json``."""
    return f"{value} {line}"


def _saved_bytes(run: RunResult) -> int:
    """Returns the size of one member's file, or of its arrays if the run saves whole models."""
    for kind in (run_folder.PROMPTS, run_folder.TUNED):
        files = sorted((run.workdir / kind).glob("*.safetensors"))
        if files:
            return files[0].stat().st_size
    return sum(array[0].nbytes for array in run.best_tuned.values())


def with_training(of: Experiment, **fields: Any) -> Experiment:
    """Returns the experiment with other values of fields of ``training``."""
    return dataclasses.replace(of, training=dataclasses.replace(of.training, **fields))
