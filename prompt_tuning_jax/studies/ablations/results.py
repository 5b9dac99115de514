"""The results of an ablation: means and deviations over seeds, as JSON, Markdown and a figure."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prompt_tuning_jax.checkpoints import run_folder
from prompt_tuning_jax.config.experiment import Data
from prompt_tuning_jax.data.tasks.metrics import Direction, best_of
from prompt_tuning_jax.storage import atomic_write
from prompt_tuning_jax.studies.ablations.axes import Axis, Value
from prompt_tuning_jax.studies.ablations.grid import Grid
from prompt_tuning_jax.studies.suite import markdown_rows, without_nan
from prompt_tuning_jax.training.curves import GRAY, MEMBER_COLORS, STYLE

_NAMES = {"full": "model tuning", "objective": "pre-training objective"}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The results at one value and line of a grid.

    Attributes:
      scores: of each seed, on the split that the study reports.
      ensemble: the score of the members' majority vote; None without an evaluation of its own.
      chosen: a learning rate or number of demonstrations that was chosen first; may be empty.
      trained: the number of trained parameters.
      model_parameters: the number of parameters of the frozen model.
      cost: seconds and peak bytes of a step, if they were measured.
    """

    value: Value
    line: Value | None
    seeds: tuple[int, ...]
    scores: tuple[float, ...]
    ensemble: float | None = None
    chosen: str = ""
    trained: int = 0
    model_parameters: int = 0
    cost: Mapping[str, float] | None = None

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return statistics.fmean(self.scores)

    @property
    def std(self) -> float | None:
        """The sample standard deviation over seeds; None for one seed."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None


@dataclass(frozen=True, kw_only=True)
class Results:
    """All finished cells of a grid, in its order, and what the scores are."""

    grid: Grid
    cells: tuple[Cell, ...]
    metric: str
    split: str
    task: str
    model: str
    majority: float | None
    notes: tuple[str, ...]
    number: int  # of cells when all are finished
    direction: Direction = "max"  # of the metric
    over: str = ""  # what the scores of a cell are, if they are not of single seeds
    heading: str = ""  # of the Markdown file; empty: "Ablation of" the axis
    details: Mapping[str, Any] = field(default_factory=dict)  # further values of the JSON file

    def cell(self, value: Value, line: Value | None) -> Cell | None:
        """Returns the cell of a value and line if it is finished."""
        return next((c for c in self.cells if c.value == value and c.line == line), None)


def task_title(data: Data) -> str:
    """Returns a task's name, or the folder of a user's files."""
    if not data.train:
        return data.task
    return Path(data.train).parent.name or Path(data.train).stem


def lines_of(results: Results) -> list[str]:
    """Returns the table as Markdown lines, with notes that explain it."""
    grid = results.grid
    if grid.line_axis is not None:
        heading = [grid.axis.label, *(_shown(line) for line in grid.lines)]
        rows = [heading]
        for value in grid.values:
            cells = [results.cell(value, line) for line in grid.lines]
            rows.append([_shown(value), *(_mean_and_std(cell) for cell in cells)])
    else:
        rows = [[grid.axis.label, results.metric, "best"]]
        extra = _extra_columns(results.cells)
        rows[0] += list(extra)
        for cell in results.cells:
            best = f"{cell.scores[best_of(cell.scores, results.direction)]:.1f}"
            row = [_shown(cell.value), _mean_and_std(cell), best]
            rows.append([*row, *(column(cell) for column in extra.values())])
    return [*markdown_rows(rows), "", *_notes(results)]


def _extra_columns(cells: Sequence[Cell]) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    if any(cell.ensemble is not None for cell in cells):
        columns["ensemble"] = lambda c: "" if c.ensemble is None else f"{c.ensemble:.1f}"
    if any(cell.chosen for cell in cells):
        columns["chosen"] = lambda c: c.chosen
    if len({cell.trained for cell in cells}) > 1:
        columns["trained parameters"] = lambda c: f"{c.trained:,}"
    if len({cell.model_parameters for cell in cells}) > 1:
        columns["model parameters"] = lambda c: f"{c.model_parameters:,}"
    if any(cell.cost for cell in cells):
        columns["s per step"] = lambda c: f"{c.cost['step_seconds']:.3f}" if c.cost else ""
        columns["memory MB"] = lambda c: f"{c.cost['step_bytes'] / 1e6:,.0f}" if c.cost else ""
        columns["saved kB"] = lambda c: f"{c.cost['saved_bytes'] / 1e3:,.1f}" if c.cost else ""
    return columns


def _notes(results: Results) -> list[str]:
    seeds = sorted({seed for cell in results.cells for seed in cell.seeds})
    deviation = " ± standard deviation" if len(seeds) > 1 else ""
    named = ", ".join(map(str, seeds))
    of = f"over seeds {named}" if len(seeds) > 1 else f"of seed {named}"
    if results.over:
        deviation, of = " ± standard deviation", results.over
    notes = [
        f"{results.task}, {_shown_split(results.split)}; {results.metric}, mean{deviation} {of}; "
        f"{results.model}."
    ]
    if results.majority is not None:
        notes.append(f"The majority class scores {results.majority:.1f}.")
    if len(results.cells) < results.number:
        notes.append(f"{len(results.cells)} of {results.number} points are done.")
    return [*notes, *results.notes]


def _shown_split(split: str) -> str:
    """Names a split, or the user's file."""
    return split if "." in split else f"{split} split"


def as_json(results: Results) -> dict[str, Any]:
    """Returns all numbers as JSON values."""
    grid = results.grid
    values = {
        "ablation": grid.axis.name,
        "lines": grid.line_axis.name if grid.line_axis is not None else None,
        "task": results.task,
        "model": results.model,
        "split": results.split,
        "metric": results.metric,
        "majority": results.majority,
        "complete": len(results.cells) == results.number,
        "points": [
            {
                "value": str(cell.value),
                "line": None if cell.line is None else str(cell.line),
                "seeds": list(cell.seeds),
                "scores": list(cell.scores),
                "mean": cell.mean,
                "std": cell.std,
                "ensemble": cell.ensemble,
                "chosen": cell.chosen,
                "trained_parameters": cell.trained,
                "model_parameters": cell.model_parameters,
                "cost": None if cell.cost is None else dict(cell.cost),
            }
            for cell in results.cells
        ],
        "notes": list(results.notes),
        **results.details,
    }
    finite: dict[str, Any] = without_nan(values)
    return finite


def write(results: Results, stem: Path) -> tuple[Path, ...]:
    """Writes ``STEM.md``, ``STEM.json`` and ``STEM.png``; returns their paths."""
    files = tuple(stem.with_name(f"{stem.name}.{suffix}") for suffix in ("md", "json", "png"))
    heading = results.heading or f"Ablation of {results.grid.axis.label}"
    with atomic_write(files[0]) as aside:
        text = "\n".join([f"# {heading}", "", *lines_of(results), ""])
        aside.write_text(text, encoding="utf-8")
    run_folder.write_json(files[1], as_json(results))
    draw(results, files[2])
    return files


def draw(results: Results, png: Path) -> None:
    """Draws the mean of each line, with a band or bars of one standard deviation."""
    import matplotlib
    from matplotlib.figure import Figure

    grid = results.grid
    with matplotlib.rc_context(dict(STYLE)):
        width = 6.4 if grid.line_axis is None else 8.4  # a legend is beside the lines
        figure = Figure(figsize=(width, 4.0), dpi=200, layout="constrained")
        axis: Any = figure.subplots()
        places = _places(results)
        connected = grid.axis.scale != "names" or grid.axis.name == "length"
        for number, line in enumerate(grid.all_lines):
            cells = [cell for cell in results.cells if cell.line == line]
            if not cells:
                continue
            at = np.array([places[cell.value.name] for cell in cells])
            mean = np.array([cell.mean for cell in cells])
            spread = np.array([cell.std or 0.0 for cell in cells])
            color = MEMBER_COLORS[number % len(MEMBER_COLORS)]
            label = None if line is None else _shown(line)
            if connected:
                axis.fill_between(at, mean - spread, mean + spread, color=color, alpha=0.1, lw=0)
                axis.plot(at, mean, "o-", color=color, ms=4, label=label)
            else:
                shift = (number - (len(grid.all_lines) - 1) / 2) * 0.08
                axis.errorbar(
                    at + shift, mean, spread, fmt="o", color=color, ms=5, capsize=3, label=label
                )
            for cell, x in zip(cells, at, strict=True):
                each = np.full(len(cell.scores), x + (0 if connected else shift))
                axis.plot(each, cell.scores, ".", color=color, ms=3, alpha=0.5)
        if results.majority is not None:
            axis.axhline(results.majority, color=GRAY, ls=(0, (4, 3)), lw=1.2, zorder=1)
            axis.annotate(
                f"majority class {results.majority:.1f}",
                xy=(1, results.majority),
                xycoords=("axes fraction", "data"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="right",
                color=GRAY,
                fontsize=9,
            )
        _scale(axis, grid.axis, places, results)
        axis.set_xlabel(grid.axis.title)
        task = results.task.replace("_", " ")
        axis.set_title(f"{task}: {results.split} {results.metric}")
        if grid.line_axis is not None:
            title = grid.line_axis.title
            figure.legend(loc="outside right upper", title=title, alignment="left")
        with atomic_write(png) as aside:
            figure.savefig(aside, format="png")


def _places(results: Results) -> dict[str, float]:
    """Returns the horizontal position of each value."""
    grid = results.grid
    if grid.axis.name == "size":
        sizes = {cell.value.name: cell.model_parameters for cell in results.cells}
        return {name: float(size) for name, size in sizes.items()}
    if grid.axis.scale == "names":
        return {value.name: float(number) for number, value in enumerate(grid.values)}
    return {value.name: float(value.name) for value in grid.values}


def _scale(axis: Any, of: Axis, places: Mapping[str, float], results: Results) -> None:
    names = [name.replace("_", " ") for name in places]
    if of.name == "size":
        names = [
            f"{name}\n{_count(size)}" for name, size in zip(names, places.values(), strict=True)
        ]
    if of.scale == "log" and all(place > 0 for place in places.values()):
        axis.set_xscale("log")
        axis.minorticks_off()
    axis.set_xticks(list(places.values()), [_NAMES.get(name, name) for name in names])
    if of.scale == "names":
        axis.set_xlim(-0.5, len(places) - 0.5)
    if of.scale == "names" and max(map(len, names)) * len(names) > 60:
        axis.tick_params(axis="x", rotation=40)
        for label in axis.get_xticklabels():
            label.set_horizontalalignment("right")


def _count(number: float) -> str:
    if number < 1e9:
        return f"{number / 1e6:.3g} M"
    return f"{number / 1e9:.3g} B"


def _shown(value: Value) -> str:
    return _NAMES.get(value.name, value.name.replace("_", " "))


def _mean_and_std(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    if not math.isfinite(cell.mean):
        return "-"
    return f"{cell.mean:.1f}" + ("" if cell.std is None else f" ± {cell.std:.1f}")
