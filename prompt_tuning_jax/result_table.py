"""The scores of several prompts and of their ensemble, for people and for programs."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Scores(Protocol):
    """What an evaluation returns: ``{metric: value}`` for each prompt and over all of them."""

    @property
    def names(self) -> Sequence[str]: ...
    @property
    def per_prompt(self) -> Sequence[Mapping[str, float]]: ...
    @property
    def mean(self) -> Mapping[str, float]: ...
    @property
    def best(self) -> Mapping[str, float]: ...
    @property
    def ensemble(self) -> Mapping[str, float] | None: ...
    @property
    def split(self) -> str: ...


def scores_as_dict(scores: Scores) -> dict[str, Any]:
    """The scores as values of JSON."""
    return {
        "split": scores.split,
        "per_prompt": [
            {"prompt": name, **values}
            for name, values in zip(scores.names, scores.per_prompt, strict=True)
        ],
        "mean": dict(scores.mean),
        "best": dict(scores.best),
        "ensemble": None if scores.ensemble is None else dict(scores.ensemble),
    }


def print_scores(scores: Scores) -> None:
    """Print a table: one row per prompt, then the mean, the best and the ensemble's vote."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    metrics = list(dict.fromkeys(name for each in scores.per_prompt for name in each))
    # A name may well hold the brackets that rich takes for markup.
    table = Table()
    table.add_column(Text(scores.split))
    for metric in metrics:
        table.add_column(Text(metric), justify="right", no_wrap=True)

    def add_row(name: str, values: Mapping[str, float]) -> None:
        cells = [f"{values[metric]:.2f}" if metric in values else "-" for metric in metrics]
        table.add_row(Text(name), *cells)

    for name, values in zip(scores.names, scores.per_prompt, strict=True):
        add_row(name, values)
    if len(scores.per_prompt) > 1:
        table.add_section()
        for name in ("mean", "best", "ensemble"):
            if values := getattr(scores, name):
                add_row(name, values)
    Console().print(table)
