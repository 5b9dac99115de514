"""Runs an ablation: trains the points of a grid, several at once, and writes figure and table.

An interrupted ablation resumes where it stopped: finished runs keep their scores, and the
interrupted one resumes from its last checkpoint.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from prompt_tuning_jax.checkpoints.run_folder import workdir_of
from prompt_tuning_jax.config.config_file import RUN_CONFIG
from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.setup import (
    shared_model,
)
from prompt_tuning_jax.studies.ablations.grid import Grid, Group
from prompt_tuning_jax.studies.ablations.points import (
    Settings,
    cell_key,
    score_group,
    tested_on,
    with_training,
)
from prompt_tuning_jax.studies.ablations.results import Cell, Results, lines_of, task_title, write
from prompt_tuning_jax.studies.suite import data_of, say
from prompt_tuning_jax.training.resume import require_place, require_run

_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"


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


def in_folder(group: Group, root: Path) -> Group:
    """Returns the group with its folder in ``root`` as the run's working directory."""
    return dataclasses.replace(
        group,
        experiment=with_training(group.experiment, workdir=str(root / group.name)),
        whole=group.whole and in_folder(group.whole, root),
    )


def check(groups: Sequence[Group], settings: Settings) -> None:
    """Raises UserError for data that is missing, and for folders with other runs."""
    for group in groups:
        of = group.experiment
        data_of(of)
        if settings.test is not None:
            data_of(tested_on(of, settings), training=False)
        folder = workdir_of(of)
        if (folder / RUN_CONFIG).is_file() and not settings.search:
            require_run(folder, of, exactly=True)


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
            finished = [
                (point.seed, member, result)
                for group, result in kept
                for point, member in zip(group.points, _padded(group, result), strict=True)
                if point.value == value and point.line == line
            ]
            if len(finished) < len(experiment.training.seeds):
                continue
            (_, _, first), *_ = finished
            whole = all(result is first for _, _, result in finished)
            if not first.get("all_seeds", True):
                finished = finished[:1]  # nothing is drawn, so all seeds are the same
            cells.append(
                Cell(
                    value=value,
                    line=line,
                    seeds=tuple(seed for seed, _, _ in finished),
                    scores=tuple(_score(member, settings) for _, member, _ in finished),
                    ensemble=first["ensembles"].get(cell_key(value, line)) if whole else None,
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
        task=_all(task_title(group.experiment.data) for group, _ in kept),
        model=_all(group.experiment.model.name_or_path for group, _ in kept),
        majority=majority.pop() if len(majority) == 1 else None,
        notes=_notes([group.experiment for group, _ in kept], settings),
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


def _all(texts: Iterable[str]) -> str:
    """Returns the different texts, in their order."""
    return ", ".join(dict.fromkeys(texts))


def _notes(experiments: Sequence[Experiment], settings: Settings) -> tuple[str, ...]:
    trainings = [of.training for of in experiments]
    steps = _all(f"{training.steps:,}" for training in trainings)
    sizes = _all(str(training.batch_size) for training in trainings)
    what = "the best checkpoint of each, by this score, so it is a little optimistic"
    if settings.test is not None:
        what = "the checkpoint that was the best on the validation split"
    notes = [
        f"{steps} steps of {sizes} examples; scores are of {what}.",
    ]
    if settings.search:
        notes.append("The first seed chose each learning rate on the validation split.")
    return (*notes, *settings.notes)
