"""The example configs that come with the package."""

import ast
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from prompt_tuning_jax.checkpoints.destination import atomic_write_to, require_free
from prompt_tuning_jax.config.config_file import load_config
from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.errors import UserError, suggest

# Beside the package in a clone, and inside it where it is installed.
_PLACES = (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs")
OWN_DATA = "own_data.py"


def example_file(name: str) -> Path:
    """The file of an example, such as ``lora.py`` or ``gin/lora.gin``; UserError for no example."""
    folder = _folder()
    names = [str(path.relative_to(folder)) for path in _files(folder)]
    asked = name.removeprefix("configs/")
    known = next((one for one in (asked, f"{asked}.py") if one in names), None)
    if known is None:
        raise UserError(f"there is no example config {name!r}: {suggest(asked, names, most=99)}")
    return folder / known


def examples_with_titles() -> Iterator[tuple[str, str]]:
    """The name of each example, and its first line about itself."""
    folder = _folder()
    for path in _files(folder):
        yield str(path.relative_to(folder)), _title(path)


def own_data_experiment() -> Experiment:
    """What is done with files of a user's own where no config says it; they are not named yet."""
    experiment = load_config(str(example_file(OWN_DATA)))
    return replace(experiment, data=replace(experiment.data, train="", eval=""))


def init(name: str, destination: str | Path = "", *, overwrite: bool = False) -> Path:
    """Writes an example config, to the current folder unless told where, and returns the file.

    The commands in it name the written file.  Raises UserError for no example, and for a file that
    exists, unless ``overwrite``.
    """
    source = example_file(name)
    path = Path(destination or source.name).expanduser()
    if path.is_dir():
        path = path / source.name
    relative = source.relative_to(_folder())
    text = source.read_text(encoding="utf-8").replace(f"configs/{relative}", str(path))
    require_free(path.absolute(), overwrite=overwrite, folder=False)
    with atomic_write_to(path.absolute(), overwrite=overwrite, folder=False) as aside:
        aside.write_text(text, encoding="utf-8")
    return path


def _folder() -> Path:
    found = next((place for place in _PLACES if (place / OWN_DATA).is_file()), None)
    if found is None:
        raise UserError(f"the example configs are missing: there is no folder {_PLACES[0]}")
    return found


def _files(folder: Path) -> list[Path]:
    return [*sorted(folder.glob("*.py")), *sorted(folder.glob("gin/*.gin"))]


def _title(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    first = text.partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
