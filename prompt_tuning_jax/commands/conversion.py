"""Converts models and prompts, a run's own among them."""

from pathlib import Path
from typing import Any

from prompt_tuning_jax import run_folder
from prompt_tuning_jax.checkpoints import convert as converter
from prompt_tuning_jax.config_file import RUN_CONFIG
from prompt_tuning_jax.errors import UserError


def convert(source: str | Path, destination: str | Path, **options: Any) -> converter.Converted:
    """Writes a model or prompt, or the prompts of a run's folder, in another format.

    All that ``checkpoints.convert.convert`` says holds, options and errors.
    """
    place = Path(source)
    if place.is_dir() and (place / RUN_CONFIG).is_file():
        source = place / run_folder.PROMPTS
        if not source.is_dir():
            raise UserError(f"{place} is a run that holds no prompts: it has no {source.name}/ yet")
    return converter.convert(source, destination, **options)
