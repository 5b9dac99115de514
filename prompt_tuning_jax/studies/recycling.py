"""Prompts on another version of their model: recycled, re-tuned and untouched.

Lester et al. 2022, *Reducing Retraining by Recycling Parameter-Efficient Prompts*: a map between
the token embeddings of two models also maps prompts, which need no training on the new model then.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prompt_tuning_jax.analysis.recycling import (
    BY,
    Fit,
    embeddings,
    recycle,
    relative_error,
    shared_pieces,
)
from prompt_tuning_jax.checkpoints import run_folder
from prompt_tuning_jax.checkpoints.inspect import open_source
from prompt_tuning_jax.checkpoints.prompt_file import load_prompt
from prompt_tuning_jax.checkpoints.run_folder import member_names, prompt_files, workdir_of
from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.config.overrides import to_dict
from prompt_tuning_jax.config.validation import validate
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.evaluation import evaluate
from prompt_tuning_jax.inference.setup import shared_model
from prompt_tuning_jax.studies.ablations.axes import Axis, Value
from prompt_tuning_jax.studies.ablations.grid import Grid, Group, Point
from prompt_tuning_jax.studies.ablations.points import (
    Settings,
    as_read,
    digests_of,
    score_group,
    tested_on,
)
from prompt_tuning_jax.studies.ablations.results import Cell, Results, lines_of, write
from prompt_tuning_jax.studies.ablations.run import AblationResult, check
from prompt_tuning_jax.studies.named_tasks import (
    Task,
    majority_note,
    require_prompts,
    tasks_of,
    unchanged,
)
from prompt_tuning_jax.studies.suite import data_of, say
from prompt_tuning_jax.training.resume import require_place
from prompt_tuning_jax.untrusted_input import read_json_file

OLD, NEW = Value(name="on the old model"), Value(name="re-tuned on the new one")
UNTOUCHED, NONE = Value(name="untouched"), Value(name="no prompt")
RECYCLED = {by: Value(name=f"recycled: {by}") for by in BY}
WAYS = (OLD, NEW, *RECYCLED.values(), UNTOUCHED, NONE)


def recycled_prompts(
    experiment: Experiment,
    tasks: Sequence[str],
    *,
    model: str,
    form: str = "taskless",
    test_split: str = "",
    quiet: bool = False,
) -> AblationResult:
    """Trains prompts on the experiment's model and on ``model``, and recycles the former.

    Scores on ``model`` are those of its own prompts, of the recycled ones by each method, of the
    untouched ones, and of the model without a prompt.  Tasks are named as for ``spot``.  Writes
    ``recycling.png``, ``.md`` and ``.json`` in ``training.workdir`` after each task.  Raises
    UserError before any training for models of different vocabularies, tasks without data, and a
    method other than prompt tuning.
    """
    validate(experiment)
    root = workdir_of(experiment)
    require_place(root)
    require_prompts(experiment, "--to_model")
    old = experiment.model.name_or_path
    if model == old:
        raise UserError(f"--to_model {model} is the config's model; name another version of it")
    here, there = open_source(old), open_source(model)
    shared_pieces((old, here), (model, there))
    same_width = here.config.embed_dim == there.config.embed_dim
    rows = min(here.config.vocab_size, there.config.vocab_size)  # one may have more padding
    differ = None
    if same_width:
        differ = relative_error(embeddings(here)[:rows], embeddings(there)[:rows])
    goals = tasks_of(experiment, tasks, form=form, test_split=test_split, option="--from")
    groups = {way: [_group(goal, way, root, model) for goal in goals] for way in (OLD, NEW)}
    for number, goal in enumerate(goals):
        check([groups[OLD][number], groups[NEW][number]], Settings(test=goal.test))
    points: dict[Value, list[dict[str, Any]]] = {OLD: [], NEW: []}
    scores_by_task: dict[str, dict[str, Any]] = {}
    files: tuple[Path, ...] = ()
    results: Results | None = None
    with shared_model():
        for way, each in groups.items():  # one model after the other, because it is loaded once
            for number, (goal, group) in enumerate(zip(goals, each, strict=True)):
                settings = Settings(test=goal.test)
                say(quiet, f"\n{group.name}")
                stopped_by, point = score_group(group, settings, quiet=quiet)
                if stopped_by:
                    return AblationResult(results=results, files=files, stopped_by=stopped_by)
                points[way].append(point)
                if way != NEW:
                    continue
                before = points[OLD][number]
                scores_by_task[goal.name] = _carried(
                    groups[OLD][number].experiment,
                    tested_on(group.experiment, settings),
                    root / "recycled" / goal.name,
                    fingerprints=(before["model"], point["model"]),
                    metric=point["metric"],
                    same_width=same_width,
                )
                for name, record in ((OLD, before), (NEW, point)):
                    key = "validation" if goal.test is None else "test"
                    scores_by_task[goal.name][name.name] = [
                        member[key] for member in record["members"]
                    ]
                results = _results(
                    experiment,
                    model,
                    scores_by_task,
                    points[NEW],
                    differ=differ,
                    number=len(goals),
                    split=test_split,
                )
                files = write(results, root / "recycling")
    if results is not None:
        say(quiet, "", *lines_of(results), "", *(f"written: {file}" for file in files))
    return AblationResult(results=results, files=files, stopped_by=0)


def _group(goal: Task, way: Value, root: Path, model: str) -> Group:
    """Returns the run of all seeds on the old or the new model."""
    of = goal.experiment
    name = f"{'old' if way == OLD else 'new'}/{goal.name}"
    if way == NEW:
        of = dataclasses.replace(of, model=dataclasses.replace(of.model, name_or_path=model))
    training = dataclasses.replace(of.training, workdir=str(root / name))
    seeds = training.seeds
    return Group(
        name=name,
        experiment=validate(dataclasses.replace(of, training=training)),
        points=tuple(Point(value=Value(name=goal.name), line=way, seed=seed) for seed in seeds),
    )


def _carried(
    trained: Experiment,
    tested: Experiment,
    folder: Path,
    *,
    fingerprints: tuple[str, str],
    metric: str,
    same_width: bool,
) -> dict[str, Any]:
    """Returns the scores of the old prompts on the new model by way, and errors of the maps.

    They are kept in ``folder``, where the recycled prompts are, too.
    """
    paths = prompt_files(workdir_of(trained), member_names(trained))
    wanted = as_read(
        {
            "experiment": to_dict(tested),
            "examples": data_of(tested, training=False),
            "models": fingerprints,
            "prompts": digests_of(paths),
        }
    )
    file = folder / "scores.json"
    if file.is_file():
        kept = read_json_file(file)
        if isinstance(kept, dict) and kept.get("of") == wanted:
            return dict(kept["scores"])

    def scores(prompts: Sequence[Any]) -> list[float]:
        return [each[metric] for each in evaluate(tested, prompts=prompts).per_prompt]

    by_way: dict[str, Any] = {NONE.name: scores([])}
    if same_width:
        # Arrays, because a file names the model that it belongs to.
        by_way[UNTOUCHED.name] = scores([load_prompt(path) for path in paths])
    source, target = trained.model.name_or_path, tested.model.name_or_path
    for by, way in RECYCLED.items():
        carried = [
            recycle(
                path,
                source=source,
                target=target,
                output=folder / by / path.name,
                fit=Fit(by=by),
                overwrite=True,
            )
            for path in paths
        ]
        by_way[way.name] = scores([one.paths[0] for one in carried])
        by_way[f"{way.name}, error"] = carried[0].held_out_error
    run_folder.write_json(file, {"of": wanted, "scores": by_way})
    return by_way


def _results(
    experiment: Experiment,
    model: str,
    scores_by_task: Mapping[str, Mapping[str, Any]],
    points: Sequence[Mapping[str, Any]],
    *,
    differ: float | None,
    number: int,
    split: str,
) -> Results:
    values = tuple(Value(name=name) for name in scores_by_task)
    cells = []
    for value in values:
        scores = scores_by_task[value.name]
        for way in WAYS:
            if way.name not in scores:
                continue
            each = tuple(math.nan if score is None else score for score in scores[way.name])
            cells.append(
                Cell(
                    value=value, line=way, seeds=experiment.training.seeds[: len(each)], scores=each
                )
            )
    (some, *_) = scores_by_task.values()
    errors = ", ".join(f"{by} {some[f'{way.name}, error']:.3f}" for by, way in RECYCLED.items())
    training = experiment.training
    notes = [
        f"New model: {model}.  {training.steps:,} steps of {training.batch_size} on either model.",
        f"Relative error of the maps on held-out pieces: {errors}."
        + ("" if differ is None else f"  The embeddings differ by {differ:.3f}."),
        majority_note(
            dict(zip(scores_by_task, (point["majority"] for point in points), strict=False))
        ),
    ]
    first = points[0]
    return Results(
        grid=Grid(
            axis=Axis(name="task", title="task", apply=unchanged, scale="names"),
            values=values,
            line_axis=Axis(name="prompt", title="prompt", apply=unchanged, scale="names"),
            lines=WAYS,
        ),
        cells=tuple(cells),
        metric=", ".join(dict.fromkeys(point["metric"] for point in points)),
        split=split or first["split"],
        task=f"{len(scores_by_task)} task{'s' * (len(scores_by_task) != 1)}",
        model=experiment.model.name_or_path,
        majority=None,
        notes=tuple(notes),
        number=number * len({cell.line for cell in cells}),
        heading="Recycled prompts",
        details={"new_model": model, "embeddings_differ": differ, "scores": dict(scores_by_task)},
    )
