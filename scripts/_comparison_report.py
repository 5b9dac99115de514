"""The tables and the figure of ``compare_models``."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import prompt_tuning_jax as pt
from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints import run_folder
from prompt_tuning_jax.storage import atomic_write
from prompt_tuning_jax.training.curves import GRAY, MEMBER_COLORS, STYLE

COLUMNS = ("model", "method", "trained", "mean", "best", "ensemble", "minutes")
NAMES = {
    "none": "no prompt",
    "few_shot": "few-shot",
    "lora": "LoRA",
    "full": "model tuning",
    "peft": "prompt tuning with PEFT",
}
PANELS = 3  # per row of the figure


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Formats a table for each task."""
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        lines += [f"{_plain(task)}\n", "| " + " | ".join(COLUMNS) + " |"]
        lines.append("|---|---|" + "---:|" * (len(COLUMNS) - 2))
        for row in (row for row in rows if row["task"] == task):
            cells = [row["model"], _plain(row["method"]), f"{row['trained']:,}"]
            cells += [f"{row[name]:.1f}" for name in COLUMNS[3:]]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def write(rows: Sequence[dict[str, Any]], output: Path) -> None:
    """Writes the tables as Markdown; beside them all numbers as JSON, and the figure as PNG."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output) as aside:
        aside.write_text(markdown(rows) + "\n", encoding="utf-8")
    run_folder.write_json(output.with_suffix(".json"), list(rows))
    draw(rows, output.with_suffix(".png"))


def draw(rows: Sequence[dict[str, Any]], png: Path) -> None:
    """Draws scores against the size of the model: a panel for each task, a line for each method.

    The line of prompt tuning is the mean of its seeds, and the band reaches to the best of them;
    the broken line is the ensemble of its prompts.
    """
    import matplotlib
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    sizes = {name: parameters_of(name) for name in dict.fromkeys(row["model"] for row in rows)}
    columns = min(len(tasks), PANELS)
    lines = -(-len(tasks) // columns)
    with matplotlib.rc_context(dict(STYLE)):
        size = (3.4 * columns + 2.0, 3.2 * lines)
        figure = Figure(figsize=size, dpi=160, layout="constrained")
        panels = np.ravel(figure.subplots(lines, columns, squeeze=False))
        for panel, task in zip(panels, tasks, strict=False):
            for number, method in enumerate(methods):
                of = [row for row in rows if (row["task"], row["method"]) == (task, method)]
                of.sort(key=lambda row: sizes[row["model"]])
                _line(panel, of, sizes, method, MEMBER_COLORS[number % len(MEMBER_COLORS)])
            panel.set_xscale("log")
            panel.minorticks_off()
            labels = [  # every second one lower, for models of similar size
                f"{chr(10) * 2 * (number % 2)}{name}\n{count / 1e6:.0f} M"
                for number, (name, count) in enumerate(sizes.items())
            ]
            panel.set_xticks(list(sizes.values()), labels, fontsize=8)
            panel.set_xlim(min(sizes.values()) / 1.6, max(sizes.values()) * 1.6)
            panel.set_title(_plain(task))
        for panel in panels[len(tasks) :]:
            panel.set_visible(False)
        panels[0].set_ylabel("test accuracy")
        drawn: dict[str, Any] = {}
        for panel in panels:
            handles, names = panel.get_legend_handles_labels()
            drawn |= dict(zip(names, handles, strict=True))
        figure.legend(list(drawn.values()), list(drawn), loc="outside right upper")
        with atomic_write(png) as aside:
            figure.savefig(aside, format="png")


def _line(
    panel: Any, rows: Sequence[dict[str, Any]], sizes: dict[str, int], method: str, color: str
) -> None:
    if not rows:
        return
    if method in ("none", "few_shot"):  # nothing is trained
        color, style = GRAY, "o-" if method == "none" else "s--"
    else:
        style = "o-"
    at = np.array([sizes[row["model"]] for row in rows])
    mean = np.array([row["mean"] for row in rows])
    name = _plain(method)
    panel.plot(at, mean, style, color=color, ms=4, label=name)
    if any(len(row["test"]) > 1 for row in rows):
        best = np.array([row["best"] for row in rows])
        panel.fill_between(at, mean, best, color=color, alpha=0.15, lw=0)
        ensemble = [row["ensemble"] for row in rows]
        panel.plot(at, ensemble, "^--", color=color, ms=4, label=f"{name}, ensemble")


@functools.cache
def parameters_of(model: str) -> int:
    """Returns the number of parameters of a model."""
    return param_tree.count(param_tree.split(pt.load_model(model))[1])


def _plain(name: str) -> str:
    return NAMES.get(name, name.replace("_", " "))
