"""Prompts that a command names: files, adapters, folders of them, runs."""

from pathlib import Path

from prompt_tuning_jax import run_folder
from prompt_tuning_jax.checkpoints.convert_prompt import prompt_files
from prompt_tuning_jax.checkpoints.prompt_file import StoredPrompt, read_prompt
from prompt_tuning_jax.config_file import RUN_CONFIG, run_config
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods import PromptTuning, PTuning


def prompt_paths(source: str | Path) -> list[str]:
    """Every prompt in a run or a folder of prompts, or ``source`` itself; UserError for no run's.

    Whether each is one is for ``read_prompt`` to say.
    """
    folder = Path(source)
    if folder.is_dir() and (folder / RUN_CONFIG).is_file():
        source = folder / run_folder.PROMPTS
        if not source.is_dir():
            run = run_config(str(folder))
            if run is None or isinstance(run.method, PromptTuning | PTuning):
                raise UserError(
                    f"{folder} is a run that holds no prompts: it has no {source.name}/ yet"
                )
            raise UserError(
                f"{folder} is a run of {type(run.method).__name__}: there is no prompt in it"
            )
    files = prompt_files(str(source))
    return [str(source)] if files is None else [str(file) for file in files]


def read_all(paths: list[str]) -> dict[str, StoredPrompt]:
    """The prompts by path; raises UserError as ``read_prompt``."""
    return {path: read_prompt(path) for path in paths}
