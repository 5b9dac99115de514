"""Config files: Python files with ``get_config()``, and the JSON file of a run."""

import dataclasses
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, TracebackType

from prompt_tuning_jax.config.experiment import NOT_IMPORTED, Experiment
from prompt_tuning_jax.config.overrides import MAX_BYTES, checked_experiment, from_json
from prompt_tuning_jax.config.paths import moved_to
from prompt_tuning_jax.errors import UserError, nearest

# Not config.json, which marks the folder of a Hugging Face model.
RUN_CONFIG = "experiment.json"


def load_config(path: str) -> Experiment:
    """Runs a Python file and returns what its ``get_config()`` returns.

    Raises:
      UserError: for a file that is missing or not Python, without ``get_config``, with a result
        that is not an Experiment, with an unknown field or a value of another type.  Other errors
        of the file keep their traceback for its author.
    """
    file = Path(path)
    if file.suffix == ".gin":
        raise UserError(f"{path} is a gin file; pass it as --gin_file={path}")
    if file.suffix == ".json":
        raise UserError(
            f"{path} is JSON, and a config is a Python file with get_config(), which may return "
            "what prompt_tuning_jax.config.overrides.from_json makes of the text"
        )
    try:
        source = file.read_bytes()
    except FileNotFoundError:
        near = nearest(file.name, sorted(p.name for p in file.parent.glob("*.py")))
        meant = "" if near is None else f" (did you mean {near!r}?)"
        raise UserError(
            f"no config file {path}{meant}; prompt-tuning init lists and writes example configs"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read the config file {path}: {error.strerror}") from None

    # The config, or its data.module, may import modules from the same folder.
    beside = str(file.resolve().parent)
    if beside not in sys.path and not Path(beside).is_relative_to(Path(__file__).resolve().parent):
        sys.path.append(beside)
    # Not an import: a config has a path, not a module name, and leaves no compiled file.
    module = ModuleType(file.stem)
    module.__file__ = path
    try:
        code = compile(source, path, "exec")
    except SyntaxError as error:
        raise UserError(f"{path} line {error.lineno or 1}: {error.msg}") from None
    except ValueError as error:
        raise UserError(f"{path} is not Python: {error}") from None
    try:
        exec(code, module.__dict__)
        experiment = _get_config(module, path)()
    except UserError as error:
        line = _line_in(path, error.__traceback__)
        raise UserError(f"{path} line {line}: {error}" if line else str(error)) from None
    if not isinstance(experiment, Experiment):
        raise UserError(
            f"{path}: get_config() must return an Experiment and returned "
            f"{type(experiment).__name__}"
        )
    try:
        return checked_experiment(experiment)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def run_config(prompt: str) -> Experiment | None:
    """Returns the experiment of a prompt's run, from the run's ``experiment.json``.

    ``prompt`` is the run's working directory, a folder in it, or a file in either.  None without
    such a file; UserError for a file that is not an experiment.

    A run's folder may come from anyone, so ``data.module`` is marked as ``NOT_IMPORTED``: only a
    module that the user names is imported.
    """
    saved = saved_config(prompt)
    if saved is None or not saved.data.module:
        return saved
    data = dataclasses.replace(saved.data, module=NOT_IMPORTED + saved.data.module)
    return dataclasses.replace(saved, data=data)


def saved_config(prompt: str) -> Experiment | None:
    """Returns what ``run_config`` does, with ``data.module`` as saved.

    It is for comparisons, and never for imports.
    """
    path = Path(os.path.abspath(prompt))  # a relative one has no parents above the current folder
    for folder in [path, *path.parents][:2] if path.is_dir() else list(path.parents)[:2]:
        file = folder / RUN_CONFIG
        if not file.is_file():
            continue
        try:
            with file.open("rb") as stream:
                return moved_to(from_json(stream.read(MAX_BYTES + 1)), folder)
        except (UserError, OSError) as error:
            raise UserError(f"{file}: {error}") from None
    return None


def _get_config(module: ModuleType, path: str) -> Callable[[], object]:
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise UserError(f"{path} has no get_config() function, which returns an Experiment")
    try:
        inspect.signature(get_config).bind()
    except TypeError:
        raise UserError(f"{path}: get_config() must not require arguments") from None
    return get_config


def _line_in(path: str, trace: TracebackType | None) -> int | None:
    lines = [frame.lineno for frame in traceback.extract_tb(trace) if frame.filename == path]
    return lines[-1] if lines else None
