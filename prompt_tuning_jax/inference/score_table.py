"""The scores of several prompts and of their ensemble, for people and for programs."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from prompt_tuning_jax.errors import printable

_UNBOUNDED = 10_000  # columns; the table is as wide as it must be


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
    @property
    def title(self) -> str: ...


def scores_as_dict(scores: Scores) -> dict[str, Any]:
    """The scores as values of JSON."""
    return {
        "split": scores.split,
        "data": scores.title,
        "per_prompt": [
            {"prompt": name, **values}
            for name, values in zip(scores.names, scores.per_prompt, strict=True)
        ],
        "mean": dict(scores.mean),
        "best": dict(scores.best),
        "ensemble": None if scores.ensemble is None else dict(scores.ensemble),
    }


def short_names(names: Sequence[str]) -> list[str]:
    """Paths without the leading folders that all of them have."""
    parts = [name.split("/") for name in names]
    common = 0
    while all(len(own) > common + 1 and own[common] == parts[0][common] for own in parts):
        common += 1
    return ["/".join(own[common:]) for own in parts]


def print_scores(scores: Scores) -> None:
    """Print a table: one row per prompt, then the mean, the best and the ensemble's vote.

    Nothing of it is cut off where stdout is no terminal.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    metrics = list(dict.fromkeys(name for each in scores.per_prompt for name in each))
    # A name may well hold the brackets that rich takes for markup.
    table = Table()
    table.add_column(Text(printable(scores.title)), overflow="fold")
    for metric in metrics:
        table.add_column(Text(printable(metric)), justify="right", no_wrap=True)

    def add_row(name: str, values: Mapping[str, float]) -> None:
        cells = [f"{values[metric]:.2f}" if metric in values else "-" for metric in metrics]
        table.add_row(Text(printable(name)), *cells)

    for name, values in zip(short_names(scores.names), scores.per_prompt, strict=True):
        add_row(name, values)
    if len(scores.per_prompt) > 1:
        table.add_section()
        for name in ("mean", "best", "ensemble"):
            if values := getattr(scores, name):
                add_row(name, values)
    Console(width=None if sys.stdout.isatty() else _UNBOUNDED).print(table)
