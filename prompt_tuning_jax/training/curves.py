"""Plots the curves of a run: the training loss, and the evaluation metrics with their best."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prompt_tuning_jax.data.tasks.metrics import Direction, best_of, direction_by_name
from prompt_tuning_jax.storage import atomic_write
from prompt_tuning_jax.training.logging import read_metrics
from prompt_tuning_jax.typing import HostArray

LOSS_COLOR = "#2f6db3"
METRIC_COLOR = "#d1602b"
INK = "#2b2b2b"
GRAY = "#8a8a8a"

STYLE: Mapping[str, Any] = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#c8c8c8",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#ececec",
    "xtick.color": "#c8c8c8",
    "ytick.color": "#c8c8c8",
    "xtick.labelcolor": "#555555",
    "ytick.labelcolor": "#555555",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
}

# One color per member: first those that are easy to tell apart, then paler and darker ones.
MEMBER_COLORS = (
    *("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#e15759", "#76b7b2", "#9c755f", "#d4a017"),
    *("#a0cbe8", "#ffbe7d", "#8cd17d", "#d4a6c8", "#ff9d9a", "#1f5f5b", "#5b3a29", "#79706e"),
)
LOG_SCALE_FROM = 30.0  # ratio of the largest loss to the smallest
MAX_METRICS = 3
LONGEST_NAME = 28  # characters that fit into a panel's legend


def plot_curves(
    metrics_jsonl: str | os.PathLike[str],
    png: str | os.PathLike[str],
    *,
    metrics: Sequence[str] = (),
    directions: Mapping[str, Direction] | None = None,
    baselines: Mapping[str, float] | None = None,
    names: Sequence[str] = (),
) -> None:
    """Plots the measurements that ``RunLog`` wrote, with a panel for the loss and one per metric.

    Each member has a light line, and the mean over members a bold one.  A star marks the best
    evaluation of any member.  Up to sixteen members have separate colors, and a legend with their
    ``names`` (default: ``seed_0``, ...).  ``metrics`` selects and orders the metrics (default: the
    first three).  ``directions`` says whether higher or lower is better where a metric's name does
    not.  ``baselines``, e.g. ``{"majority class": 50.9}``, are dashed lines in the first metric's
    panel.  Raises UserError if the measurements cannot be read or the picture cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    records = read_metrics(metrics_jsonl)
    train_steps, losses_ER = _series([(r["step"], r["loss"]) for r in records if "loss" in r])
    evals = [(r["step"], r["metrics"]) for r in records if r["kind"] == "eval"]
    shown = list(metrics or list(evals[0][1][0])[:MAX_METRICS]) if evals else []
    number = max(len(losses_ER), len(evals[0][1]) if evals else 0)
    members = list(names) or [f"seed_{i}" for i in range(number)]

    with matplotlib.rc_context(dict(STYLE)):
        # Without pyplot, Figure uses the Agg canvas, needs no display and leaves no global state.
        engine = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
        figure = Figure(figsize=(5.2 * (1 + len(shown)), 3.7), dpi=200, layout=engine)
        axes = figure.subplots(1, 1 + len(shown), squeeze=False)[0]
        _draw_loss(axes[0], train_steps, losses_ER)
        for axis, name in zip(axes[1:], shown, strict=True):
            steps, values_ER = _series(
                [(step, [one.get(name, np.nan) for one in values]) for step, values in evals]
            )
            _draw_metric(
                axis,
                steps,
                values_ER,
                name,
                direction=(directions or {}).get(name) or direction_by_name(name),
                members=members,
                baselines=(baselines or {}) if name == shown[0] else {},
            )
        if 1 < number <= len(MEMBER_COLORS):
            _draw_members_legend(figure, members)
        for axis in axes:
            axis.set_xlabel("step")
            axis.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
            axis.tick_params(length=0)
            axis.margins(x=0.02)
            if any(one.get_legend() for one in axes):  # the same room for it in all panels
                axis.set_title(axis.get_title(loc="left"), pad=26)
        with atomic_write(Path(png)) as aside:
            figure.savefig(aside, format="png")


def _series(points: Sequence[tuple[int, Sequence[float]]]) -> tuple[HostArray, HostArray]:
    """Returns the steps [R] and values [E, R] of R measurements."""
    if not points:
        return np.zeros(0), np.zeros((0, 0))
    steps, values = zip(*points, strict=True)
    return np.array(steps), np.array(values, dtype=np.float64).T


def _draw_loss(axis: Any, steps: HostArray, losses_ER: HostArray) -> None:
    from matplotlib.ticker import LogLocator

    axis.set_title("Training loss")
    if not np.isfinite(losses_ER).any():
        _say_nothing_was_logged(axis)
        return
    _draw_members(axis, steps, losses_ER, LOSS_COLOR)
    finite = losses_ER[np.isfinite(losses_ER)]
    if finite.min() > 0 and finite.max() > LOG_SCALE_FROM * finite.min():
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda loss, _: f"{loss:g}")
        axis.minorticks_off()
    elif finite.min() >= 0:
        axis.set_ylim(bottom=0)
    _draw_legend(axis)


def _draw_metric(
    axis: Any,
    steps: HostArray,
    values_ER: HostArray,
    name: str,
    *,
    direction: Direction | None,
    members: Sequence[str],
    baselines: Mapping[str, float],
) -> None:
    axis.set_title(f"Evaluation {name.replace('_', ' ')}")
    if not np.isfinite(values_ER).any():
        _say_nothing_was_logged(axis)
        return
    _draw_members(axis, steps, values_ER, METRIC_COLOR, marker="o" if len(steps) < 40 else "")
    if direction is not None:  # without a known direction, no point is the best
        index = best_of(values_ER.ravel().tolist(), direction)
        member, best = divmod(index, values_ER.shape[1])
        value = values_ER[member, best]
        named = 1 < len(values_ER) <= len(MEMBER_COLORS)
        several = len(values_ER) > 1 and len(members[member]) <= LONGEST_NAME
        of = f" ({members[member]})" if several else ""
        axis.plot(
            steps[best],
            value,
            "*",
            color=MEMBER_COLORS[member] if named else METRIC_COLOR,
            markeredgecolor="white",
            markersize=15,
            linestyle="none",
            zorder=5,
            clip_on=False,
            label=f"best: {value:.4g} at {steps[best]:,}{of}",
        )
    for label, baseline in baselines.items():
        if not np.isfinite(baseline):
            continue
        axis.axhline(baseline, color=GRAY, linestyle=(0, (4, 3)), linewidth=1.2, zorder=1)
        axis.annotate(
            f"{label} {baseline:.4g}",
            xy=(1, baseline),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            color=GRAY,
            fontsize=9,
        )
    axis.margins(y=0.12)
    _draw_legend(axis)


def _draw_members(
    axis: Any, steps: HostArray, values_ER: HostArray, color: str, *, marker: str = ""
) -> None:
    if len(values_ER) > 1:
        named = len(values_ER) <= len(MEMBER_COLORS)
        for member, values_R in enumerate(values_ER):
            style = {"color": MEMBER_COLORS[member], "alpha": 0.75} if named else {"alpha": 0.3}
            label = "each" if not named and not member else None
            axis.plot(steps, values_R, **{"color": color, "linewidth": 1, "label": label, **style})
    # The mean ends where a member diverges: the mean of the others would be a different curve.
    mean_R = values_ER.mean(axis=0)
    axis.plot(
        steps,
        mean_R,
        color=color,
        linewidth=2.2 if len(steps) < 150 else 1.3,
        marker=marker,
        markersize=4.5,
        label=f"mean of {len(values_ER)}" if len(values_ER) > 1 else None,
    )


def _draw_legend(axis: Any) -> None:
    """Draws the legend between the title and the curves, where it hides neither."""
    if axis.get_legend_handles_labels()[0]:
        axis.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=3,
            borderaxespad=0.3,
            borderpad=0,
            handlelength=1.4,
            handletextpad=0.5,
            columnspacing=1.2,
        ).set_in_layout(False)  # otherwise a long legend makes the panel narrower


def _draw_members_legend(figure: Any, members: Sequence[str]) -> None:
    """Draws a legend of the members' colors below all panels."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=color, linewidth=2) for color in MEMBER_COLORS[: len(members)]]
    width = max(map(len, members)) + 6  # in characters, including the line before the name
    columns = max(1, int(figure.get_figwidth() * 14 / width))
    figure.legend(
        lines, members, loc="outside lower left", ncols=columns, handlelength=1.4, fontsize=9
    )


def _say_nothing_was_logged(axis: Any) -> None:
    axis.text(0.5, 0.5, "nothing was logged", transform=axis.transAxes, ha="center", color=GRAY)
