"""Converts models, prompts and what other methods tuned, a run's own among them."""

import inspect
from pathlib import Path
from typing import Any

from prompt_tuning_jax import run_folder
from prompt_tuning_jax.checkpoints import convert as converter
from prompt_tuning_jax.commands.tuned_conversion import convert_tuned, tuned_files
from prompt_tuning_jax.config_file import RUN_CONFIG
from prompt_tuning_jax.data.suggest import suggest
from prompt_tuning_jax.errors import UserError


def convert(source: str | Path, destination: str | Path, **options: Any) -> converter.Converted:
    """Writes a model or prompt, or what a run has tuned, in another format.

    All that ``checkpoints.convert.convert`` says holds, options and errors; LoRA, IA3, prefixes and
    multitask prompts go between a run's files (``tuned/*.safetensors``) and PEFT's adapters.
    """
    known = list(inspect.signature(converter.convert).parameters)[2:]
    for name in options:
        if name not in known:
            raise UserError(f"convert has no argument {name!r}: {suggest(name, known)}")
    place = Path(source)
    if place.is_dir() and (place / RUN_CONFIG).is_file():
        kept = [place / name for name in (run_folder.PROMPTS, run_folder.TUNED)]
        source = next((folder for folder in kept if folder.is_dir()), "")
        if not source:
            raise UserError(
                f"{place} is a run that holds nothing to convert: it has neither prompts/ nor "
                "tuned/ yet; what trained all weights, prompt-tuning merge writes as a model"
            )
    if tuned_files(Path(source)):
        return convert_tuned(str(source), destination, **options)
    return converter.convert(source, destination, **options)
