"""Draws the figures of a report on prompts."""

from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

import numpy as np

from prompt_tuning_jax.analysis.prompts import Analysis, PromptAnalysis
from prompt_tuning_jax.training.curves import GRAY, LOSS_COLOR, MEMBER_COLORS, METRIC_COLOR, STYLE
from prompt_tuning_jax.typing import HostArray

_MOST_NUMBERS = 12  # rows of a matrix whose cells show their numbers
_MOST_NAMED = 40  # rows of a matrix that are named
_LONGEST_NAME = 32


def positions_figure(prompt: PromptAnalysis) -> bytes:
    """Returns a PNG: what leaving out each position does, and the norm of each position."""
    effects = prompt.effects
    panels: list[Callable[[Any], None]] = []
    positions = np.arange(prompt.length)

    def bars(values_P: HostArray, title: str, color: str) -> Callable[[Any], None]:
        def draw(axis: Any) -> None:
            axis.bar(positions, values_P, color=color, width=0.8)
            axis.axhline(0, color=GRAY, linewidth=0.8)
            axis.set_title(title)

        return draw

    if effects is not None:
        of = f"{effects.examples:,} examples"
        if effects.loss_P is not None:
            rises = "Rise of the loss without the position (right label among labels, nats)"
            panels.append(bars(effects.loss_P, rises, METRIC_COLOR))
        changed = f"Changed answers without the position (percent of {of})"
        panels.append(bars(effects.changed_P, changed, METRIC_COLOR))
    start = prompt.start

    def norms(axis: Any) -> None:
        axis.bar(positions, prompt.norms_P, color=LOSS_COLOR, width=0.8, label="after training")
        axis.set_title("Norm of the position")
        if start is not None:
            axis.plot(
                positions, start.norms_P, "_", color=METRIC_COLOR, ms=9, mew=2, label="at the start"
            )
            axis.legend(loc="upper right", ncols=2, bbox_to_anchor=(1, 1.2))

    panels.append(norms)

    def draw(figure: Any) -> None:
        axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
        for axis, panel in zip(axes, panels, strict=True):
            panel(axis)
            axis.grid(axis="x", visible=False)
            axis.margins(x=0.01)
        axes[-1].set_xlabel("position")
        axes[-1].xaxis.get_major_locator().set_params(integer=True)

    return _png(draw, width=8.5, height=1.9 * len(panels))


def redundancy_figure(prompt: PromptAnalysis) -> bytes:
    """Returns a PNG of the cosines between all positions of a prompt."""

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        image = _matrix(axis, prompt.redundancy.cosines_PP)
        axis.set_title("Cosine between positions")
        axis.set_xlabel("position")
        for each in (axis.xaxis, axis.yaxis):
            each.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=axis, shrink=0.8)

    return _png(draw, width=4.4, height=3.8)


def similarity_figure(analysis: Analysis) -> bytes:
    """Returns a PNG of the similarities between all prompts, with a panel per measure."""
    names = [_short(prompt.name) for prompt in analysis.prompts]
    titles = {"mean": "Cosine of the mean positions", "tokens": "Mean cosine of all positions"}

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, len(analysis.similarities), squeeze=False)[0]
        for axis, (by, matrix) in zip(axes, analysis.similarities.items(), strict=True):
            image = _matrix(axis, matrix, names=names)
            axis.set_title(titles[by])
            figure.colorbar(image, ax=axis, shrink=0.6)

    side = 2.6 + 0.3 * min(len(names), _MOST_NAMED)
    return _png(draw, width=2 * side + 2, height=side + 0.6)


def norms_figure(prompts: Sequence[PromptAnalysis]) -> bytes | None:
    """Returns a PNG of the mean norm of each prompt through training; None if no log has it."""
    logged = [prompt for prompt in prompts if prompt.norms]
    if not logged:
        return None

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        for number, prompt in enumerate(logged):
            steps, norms = map(list, zip(*prompt.norms, strict=True))
            if prompt.start is not None:
                steps.insert(0, 0)
                norms.insert(0, float(prompt.start.norms_P.mean()))
            color = MEMBER_COLORS[number % len(MEMBER_COLORS)]
            axis.plot(steps, norms, "o-", ms=3, color=color, label=_short(prompt.name))
        axis.set_title("Mean norm of the positions through training")
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
        if len(logged) <= len(MEMBER_COLORS):
            figure.legend(loc="outside right upper")

    return _png(draw, width=8.0, height=3.4)


def _matrix(axis: Any, matrix: HostArray, *, names: Sequence[str] = ()) -> Any:
    number = len(matrix)
    # Blue is similar and red is opposite, on a scale that all matrices share.
    image = axis.imshow(matrix, cmap="RdBu", vmin=-1, vmax=1, interpolation="nearest")
    axis.grid(visible=False)
    axis.tick_params(length=0)
    if names and number <= _MOST_NAMED:
        axis.set_xticks(range(number), names, rotation=90)
        axis.set_yticks(range(number), names)
    if number <= _MOST_NUMBERS:
        for row, column in np.ndindex(matrix.shape):
            value = matrix[row, column]
            color = "white" if abs(value) > 0.6 else "#2b2b2b"
            text = f"{value:.2f}".replace("-0.00", "0.00")
            axis.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
    return image


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else "…" + name[-_LONGEST_NAME + 1 :]


def _png(draw: Callable[[Any], None], *, width: float, height: float) -> bytes:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(dict(STYLE)):
        figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
        draw(figure)
        file = BytesIO()
        figure.savefig(file, format="png")
    return file.getvalue()
