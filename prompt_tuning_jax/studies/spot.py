"""Soft prompt transfer: starts prompts from those of similar tasks.

Vu et al. 2022 (SPoT), sections 3 and 4: prompts of source tasks initialize the prompt of a target
task, and the similarity of tasks is the cosine of their averaged prompt vectors.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prompt_tuning_jax.analysis.similarity import similarity
from prompt_tuning_jax.checkpoints.prompt_file import load_prompt
from prompt_tuning_jax.checkpoints.run_folder import PROMPTS, member_names, prompt_files, workdir_of
from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.config.methods import split_init
from prompt_tuning_jax.config.validation import validate
from prompt_tuning_jax.data.tasks.metrics import Direction, best_of
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.setup import shared_model
from prompt_tuning_jax.studies.ablations.axes import Axis, Value, require_one_setting
from prompt_tuning_jax.studies.ablations.grid import Grid, Group, Point
from prompt_tuning_jax.studies.ablations.points import Settings, claim_data, score_group
from prompt_tuning_jax.studies.ablations.results import Cell, Results, lines_of, write
from prompt_tuning_jax.studies.ablations.run import AblationResult, check
from prompt_tuning_jax.studies.named_tasks import (
    Task,
    majority_note,
    require_prompts,
    tasks_of,
    unchanged,
)
from prompt_tuning_jax.studies.suite import data_of, markdown_rows, say
from prompt_tuning_jax.training.resume import require_place
from prompt_tuning_jax.training.run import train

OWN, NEAREST, ANY, BEST = (
    Value(name="its own initialization"),
    Value(name="the most similar source"),
    Value(name="any source, on average"),
    Value(name="the best source by validation"),
)
STARTS = (OWN, NEAREST, ANY, BEST)
_OWN = "own"  # instead of the name of a source


@dataclass(frozen=True, kw_only=True)
class Start:
    """The scores of a target's prompt for one seed and one start.

    ``similarity`` is that of the source's prompt and the prompt that the target trained from its
    own initialization; None for that initialization itself.
    """

    source: str
    validation: float
    score: float
    similarity: float | None


def spot(
    experiment: Experiment,
    sources: Sequence[str],
    targets: Sequence[str],
    *,
    examples: int,
    source_steps: int = 0,
    form: str = "taskless",
    test_split: str = "",
    quiet: bool = False,
) -> AblationResult:
    """Trains prompts of source tasks, and target prompts that start from each of them.

    Each target trains on at most ``examples`` examples (0: all), which each seed draws for itself,
    from its own initialization (the config's) and from the prompt of each other task in
    ``sources``.  A source has one prompt, of the first seed, which trains on all examples for
    ``source_steps`` steps (0: those of the experiment).  Writes ``spot.png``, ``.md`` and ``.json``
    in ``training.workdir`` after each target.
    Raises UserError before any training for tasks without data, for a method other than prompt
    tuning, and for a target without another task as its source.
    """
    validate(experiment)
    root = workdir_of(experiment)
    require_place(root)
    require_prompts(experiment, "--spot")
    require_one_setting(experiment)
    origins = tasks_of(experiment, sources, form=form, test_split=test_split, option="--from")
    goals = tasks_of(experiment, targets, form=form, test_split=test_split, option="--to")
    for goal in goals:
        if [origin.name for origin in origins] == [goal.name]:
            raise UserError(f"--from names no task besides {goal.name}, which --to names")
    plans = {origin.name: _source_run(origin, root, source_steps) for origin in origins}
    for of in plans.values():
        data_of(of)
    groups = {
        goal.name: _target_runs(goal, plans, experiment.training.seeds, root, examples)
        for goal in goals
    }
    for goal in goals:
        check(groups[goal.name], Settings(test=goal.test))
    starts_by_target: dict[str, list[list[Start]]] = {}
    last: dict[str, Any] = {}
    files: tuple[Path, ...] = ()
    results: Results | None = None
    with shared_model():
        for number, (name, of) in enumerate(plans.items()):
            say(quiet, f"\nsource {name}: {number + 1} of {len(plans)}")
            claim_data(of, data_of(of))
            run = train(of, quiet=quiet)
            if not run.finished:
                return AblationResult(results=None, files=(), stopped_by=run.stopped_by)
        for goal in goals:
            seeds: list[list[Start]] = []
            for group in groups[goal.name]:
                say(quiet, f"\n{group.name}: {len(group.points)} starts at once")
                stopped_by, point = score_group(group, Settings(test=goal.test), quiet=quiet)
                if stopped_by:
                    return AblationResult(results=results, files=files, stopped_by=stopped_by)
                seeds.append(_starts(group, point, tested=goal.test is not None))
                last[goal.name] = point
            starts_by_target[goal.name] = seeds
            results = summary(
                experiment,
                starts_by_target,
                last,
                examples=examples,
                steps=source_steps,
                number=len(goals),
                split=test_split,
            )
            files = write(results, root / "spot")
    if results is not None:
        say(quiet, "", *lines_of(results), "", *(f"written: {file}" for file in files))
    return AblationResult(results=results, files=files, stopped_by=0)


def _source_run(origin: Task, root: Path, steps: int) -> Experiment:
    training = origin.experiment.training
    return validate(
        dataclasses.replace(
            origin.experiment,
            training=dataclasses.replace(
                training,
                seeds=training.seeds[:1],
                steps=steps or training.steps,
                workdir=str(root / "sources" / origin.name),
            ),
        )
    )


def _target_runs(
    goal: Task, plans: Mapping[str, Experiment], seeds: Sequence[int], root: Path, examples: int
) -> list[Group]:
    """Returns a run per seed, which has its own examples; the members have different starts."""
    of = goal.experiment
    of = dataclasses.replace(of, data=dataclasses.replace(of.data, max_train_examples=examples))
    names = [name for name in plans if name != goal.name]
    inits = [str(getattr(of.method, "init", ""))]
    for name in names:
        (prompt,) = member_names(plans[name])
        folder = workdir_of(plans[name]).absolute() / PROMPTS
        inits.append(f"file={folder / prompt}.safetensors")
    groups = []
    for seed in seeds:
        name = f"targets/{goal.name}/seed_{seed}"
        training = dataclasses.replace(
            of.training,
            seeds=(seed,) * len(inits),
            inits=tuple(inits),
            workdir=str(root / name),
        )
        points = (
            Point(value=Value(name=goal.name), line=Value(name=start), seed=seed)
            for start in (_OWN, *names)
        )
        one = validate(dataclasses.replace(of, training=training))
        groups.append(Group(name=name, experiment=one, points=tuple(points)))
    return groups


def _starts(group: Group, point: Mapping[str, Any], *, tested: bool) -> list[Start]:
    """Returns the starts of a seed, the target's own initialization first."""
    of = group.experiment
    target_prompt = load_prompt(prompt_files(workdir_of(of), member_names(of))[0])
    starts = []
    for one, member, init in zip(group.points, point["members"], of.training.inits, strict=True):
        _, path = split_init(init)
        validation = _number(member["validation"])
        starts.append(
            Start(
                source=str(one.line),
                validation=validation,
                score=_number(member["test"]) if tested else validation,
                similarity=similarity(target_prompt, load_prompt(path)) if path else None,
            )
        )
    return starts


def chosen(starts: Sequence[Start], direction: Direction) -> dict[Value, float]:
    """Returns the score of each way to choose a start for one seed.

    ``direction`` is that of the scores.  ``starts`` has the target's own initialization first, then
    the sources.
    """
    own_init, *sources = starts
    nearest = max(sources, key=lambda start: start.similarity or 0.0)
    best = sources[best_of([start.validation for start in sources], direction)]
    return {
        OWN: own_init.score,
        NEAREST: nearest.score,
        ANY: statistics.fmean(start.score for start in sources),
        BEST: best.score,
    }


def correlation(starts_by_target: Mapping[str, Sequence[Sequence[Start]]]) -> float | None:
    """Returns Pearson's correlation of similarity and gain over the target's own initialization.

    The pairs of target and source are means over seeds; None for fewer than three pairs.
    """
    pairs = [pair for seeds in starts_by_target.values() for pair in _pairs(seeds).values()]
    near, gain = (np.array([pair[i] for pair in pairs]) for i in (0, 1))
    if len(pairs) < 3 or not near.std() or not gain.std():
        return None
    return float(np.corrcoef(near, gain)[0, 1])


def _pairs(seeds: Sequence[Sequence[Start]]) -> dict[str, tuple[float, float, float]]:
    """Returns the mean similarity, gain and score of each source."""
    pairs = {}
    for number, first in enumerate(seeds[0][1:], start=1):
        near = statistics.fmean(one[number].similarity or 0.0 for one in seeds)
        score = statistics.fmean(one[number].score for one in seeds)
        own_init = statistics.fmean(one[0].score for one in seeds)
        pairs[first.source] = (near, score - own_init, score)
    return pairs


def summary(
    experiment: Experiment,
    starts_by_target: Mapping[str, Sequence[Sequence[Start]]],
    points: Mapping[str, Mapping[str, Any]],
    *,
    examples: int,
    steps: int,
    number: int,
    split: str,
) -> Results:
    """Returns the results of the finished targets.

    ``starts_by_target`` has the starts of each seed.
    ``split`` names the split of the scores; if it is empty, ``points`` do.
    """
    seeds = experiment.training.seeds
    values = tuple(Value(name=name) for name in starts_by_target)
    grid = Grid(
        axis=Axis(name="target", title="target task", apply=unchanged, scale="names"),
        values=values,
        line_axis=Axis(name="start", title="start of the prompt", apply=unchanged, scale="names"),
        lines=STARTS,
    )
    cells = []
    for value in values:
        direction = points[value.name]["direction"]
        ways = [chosen(starts, direction) for starts in starts_by_target[value.name]]
        for way in STARTS:
            scores = tuple(each[way] for each in ways)
            cells.append(Cell(value=value, line=way, seeds=seeds, scores=scores))
    first = next(iter(points.values()))
    majority = {name: point["majority"] for name, point in points.items()}
    training = experiment.training
    shown = f"{examples:,} examples" if examples else "all examples"
    near = correlation(starts_by_target)
    notes = [
        f"Targets: {shown}, drawn anew by each seed, and {training.steps:,} steps of "
        f"{training.batch_size}; sources: all examples and {steps or training.steps:,} steps.",
        "Similarity is the cosine between the mean vectors of the source's prompt and of the "
        "prompt that the target trained from its own initialization.",
        "The best checkpoint, and the best source, are chosen by the validation split.",
        majority_note(majority),
    ]
    if near is not None:
        notes.append(f"Correlation of similarity and gain over the own initialization: {near:.2f}.")
    return Results(
        grid=grid,
        cells=tuple(cells),
        metric=", ".join(dict.fromkeys(point["metric"] for point in points.values())),
        split=split or first["split"],
        task=f"{len(starts_by_target)} target task{'s' * (len(starts_by_target) != 1)}",
        model=experiment.model.name_or_path,
        majority=None,
        notes=(*notes, "", *_matrix(starts_by_target)),
        number=number * len(STARTS),
        heading="Soft prompt transfer (SPoT)",
        details={
            "majorities": majority,
            "correlation": near,
            "pairs": {
                name: {
                    start.source: [dataclasses.asdict(one[n]) for one in seeds_of]
                    for n, start in enumerate(seeds_of[0])
                }
                for name, seeds_of in starts_by_target.items()
            },
        },
    )


def _matrix(starts_by_target: Mapping[str, Sequence[Sequence[Start]]]) -> list[str]:
    """Returns a Markdown table of gains and similarities, with a row per target."""
    pairs = {target: _pairs(seeds) for target, seeds in starts_by_target.items()}
    sources = list(dict.fromkeys(source for row in pairs.values() for source in row))
    rows = [["gain over the own start (similarity)", *(_shown(s) for s in sources)]]
    for target, row in pairs.items():
        cells = [
            f"{row[source][1]:+.1f} ({row[source][0]:.2f})" if source in row else "-"
            for source in sources
        ]
        rows.append([_shown(target), *cells])
    return markdown_rows(rows)


def _shown(name: str) -> str:
    return name.replace("_", " ")


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan
