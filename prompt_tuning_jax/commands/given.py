"""What callers give where several may be given: one alone is a list of one."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from prompt_tuning_jax.errors import UserError


def as_texts(values: object, name: str) -> tuple[str, ...]:
    """One text or several; UserError for anything else, and for one that is there twice."""
    found = (values,) if isinstance(values, str) else _several(values, name)
    texts = []
    for one in found:
        if not isinstance(one, str):
            raise UserError(f"{name} are texts, and one is a {type(one).__name__}: {str(one)[:40]}")
        if one in texts:
            raise UserError(f"{name} has {one!r} twice")
        texts.append(one)
    return tuple(texts)


def as_paths(values: object, name: str) -> list[str | Path]:
    """One path or several; UserError for anything else."""
    found = [values] if isinstance(values, str | Path) else _several(values, name)
    paths = []
    for one in found:
        if not isinstance(one, str | Path):
            raise UserError(f"{name} are paths, and one is a {type(one).__name__}: {str(one)[:40]}")
        paths.append(one)
    return paths


def _several(values: object, name: str) -> Iterable[object]:
    if isinstance(values, Mapping | bytes) or not isinstance(values, Iterable):
        raise UserError(f"{name} is a {type(values).__name__}: {str(values)[:40]}; give a list")
    return values
