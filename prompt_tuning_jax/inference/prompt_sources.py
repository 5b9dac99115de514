"""Resolves arguments that name one or several prompts: files, adapters, folders and runs."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from prompt_tuning_jax.checkpoints import run_folder
from prompt_tuning_jax.checkpoints.convert_prompt import prompt_files
from prompt_tuning_jax.checkpoints.prompt_file import StoredPrompt, read_prompt
from prompt_tuning_jax.config.config_file import RUN_CONFIG, run_config
from prompt_tuning_jax.errors import UserError


def prompt_paths(source: str | Path) -> list[str]:
    """Returns the paths of all prompts in a run or a folder of prompts, or else ``[source]``.

    The files are not opened; ``read_prompt`` checks them.  Raises UserError for a run without
    prompts.
    """
    folder = Path(source)
    if folder.is_dir() and (folder / RUN_CONFIG).is_file():
        source = folder / run_folder.PROMPTS
        if not source.is_dir():
            run = run_config(str(folder))
            if run is None or run.method.saves_prompts:
                if (folder / run_folder.TUNED).is_dir():
                    raise UserError(
                        f"{folder} is a run that saved more than a prompt, in {run_folder.TUNED}/: "
                        "there is no plain prompt in it"
                    )
                raise UserError(
                    f"{folder} is a run that holds no prompts: it has no {source.name}/ yet"
                )
            raise UserError(
                f"{folder} is a run of {type(run.method).__name__}: there is no prompt in it"
            )
    files = prompt_files(str(source))
    return [str(source)] if files is None else [str(file) for file in files]


def read_all(paths: list[str]) -> dict[str, StoredPrompt]:
    """Reads the prompts, keyed by path; raises UserError as ``read_prompt`` does."""
    return {path: read_prompt(path) for path in paths}


def as_texts(values: object, name: str) -> tuple[str, ...]:
    """Returns one or several texts as a tuple; raises UserError for other types and duplicates."""
    several = (values,) if isinstance(values, str) else _several(values, name)
    texts = []
    for one in several:
        if not isinstance(one, str):
            raise UserError(f"{name} are texts, and one is a {type(one).__name__}: {str(one)[:40]}")
        if one in texts:
            raise UserError(f"{name} has {one!r} twice")
        texts.append(one)
    return tuple(texts)


def as_paths(values: object, name: str) -> list[str | Path]:
    """Returns one or several paths as a list; raises UserError for other types."""
    several = [values] if isinstance(values, str | Path) else _several(values, name)
    paths = []
    for one in several:
        if not isinstance(one, str | Path):
            raise UserError(f"{name} are paths, and one is a {type(one).__name__}: {str(one)[:40]}")
        paths.append(one)
    return paths


def _several(values: object, name: str) -> Iterable[object]:
    if isinstance(values, Mapping | bytes) or not isinstance(values, Iterable):
        raise UserError(f"{name} is a {type(values).__name__}: {str(values)[:40]}; give a list")
    return values
