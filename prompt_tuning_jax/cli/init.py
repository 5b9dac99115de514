"""``prompt-tuning init``: the example configs that come with the package."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from prompt_tuning_jax.cli.arguments import Command, option, positional
from prompt_tuning_jax.cli.console import print_rows
from prompt_tuning_jax.config.config_file import load_config
from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.errors import UserError, printable, suggest
from prompt_tuning_jax.storage import expanded

# Inside the package where it is installed, and beside it in a clone.
_FOLDERS = (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs")
OWN_DATA = "own_data.py"


@dataclass(frozen=True, kw_only=True)
class Init(Command):
    """List the example configs, or write one to start from."""

    name: ClassVar[str] = "init"
    example: ClassVar[str] = "init own_data.py"

    config: str | None = positional("EXAMPLE", default=None)  # example to write (default: list all)
    # File to write (default: the example's name, in the current folder).
    output: str | None = option("FILE", default=None)
    overwrite: bool = False  # replace an existing FILE

    def run(self) -> None:
        if self.config is None:
            if self.output or self.overwrite:
                raise UserError("name an example; prompt-tuning init lists them")
            print_rows(examples_with_titles())
            return
        path = init(self.config, self.output or "", overwrite=self.overwrite)
        print(printable(f"wrote {path}"))


def example_file(name: str) -> Path:
    """Returns the file of an example, such as ``lora.py`` or ``gin/paper.gin``.

    Raises UserError otherwise.
    """
    folder = _folder()
    names = [str(path.relative_to(folder)) for path in _files(folder)]
    relative = name.removeprefix("configs/")
    known = next((one for one in (relative, f"{relative}.py") if one in names), None)
    if known is None:
        raise UserError(f"there is no example config {name!r}: {suggest(relative, names, most=99)}")
    return folder / known


def examples_with_titles() -> Iterator[tuple[str, str]]:
    """Yields the name of each example, and the first line of its description."""
    folder = _folder()
    for path in _files(folder):
        yield str(path.relative_to(folder)), _title(path)


def own_data_experiment() -> Experiment:
    """Returns the experiment for a user's files without a config.

    It does not name the files yet.
    """
    experiment = load_config(str(example_file(OWN_DATA)))
    return replace(experiment, data=replace(experiment.data, train="", eval=""))


def init(name: str, destination: str | Path = "", *, overwrite: bool = False) -> Path:
    """Writes an example config to ``destination``, or to the current folder; returns the file.

    The commands in its description name the written file.

    Raises:
      UserError: for an unknown example, and for a file that exists, without ``overwrite``.
    """
    source = example_file(name)
    path = expanded(destination or source.name)
    if path.is_dir():
        path = path / source.name
    relative = source.relative_to(_folder())
    text = source.read_text(encoding="utf-8").replace(f"configs/{relative}", str(path))
    from prompt_tuning_jax.checkpoints.destination import atomic_write_to, require_free

    require_free(path.absolute(), overwrite=overwrite, folder=False)
    with atomic_write_to(path.absolute(), overwrite=overwrite, folder=False) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _folder() -> Path:
    for folder in _FOLDERS:
        if (folder / OWN_DATA).is_file():
            return folder
    raise UserError(f"the example configs are missing: there is no folder {_FOLDERS[0]}")


def _files(folder: Path) -> list[Path]:
    return [*sorted(folder.glob("*.py")), *sorted(folder.glob("gin/*.gin"))]


def _title(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    first = text.partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
