"""Gin's syntax as data: statements of files and flags, read with gin's parser.

gin's ``parse_config`` would execute the ``import`` statements of a file, open any file that it
includes, and change the global config of the program.  Here nothing is imported, an include stays
within the folders that the user named, and errors name the file and the line.
"""

import tokenize
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gin import config_parser

from prompt_tuning_jax.errors import UserError

REQUIRED = "gin.REQUIRED"  # the macro of a value that a flag must give
_MAX_BYTES = 2**20  # of a gin file
_MAX_FILES = 500  # including each repetition of an include
MAX_ITEMS = 100_000  # of all values, with macros replaced: a macro can hold others twice


@dataclass(frozen=True)
class Macro:
    """``%name``."""

    name: str

    def __repr__(self) -> str:
        return f"%{self.name}"


@dataclass(frozen=True)
class Reference:
    """``@scopes/name()``; without the parentheses, the class itself."""

    scopes: tuple[str, ...]
    name: str
    called: bool

    def __repr__(self) -> str:
        return f"@{'/'.join((*self.scopes, self.name))}{'()' if self.called else ''}"


@dataclass(frozen=True)
class Bound:
    """A value, where it is bound, and whether a flag of the command line binds it."""

    value: Any
    where: str
    is_flag: bool


@dataclass(frozen=True, order=True)
class Key:
    """``scope/configurable.parameter``."""

    scope: str
    name: str
    parameter: str

    def __str__(self) -> str:
        return f"{self.scope}/{self.name}.{self.parameter}".removeprefix("/")


class _Delegate(config_parser.ParserDelegate):
    def configurable_reference(self, scoped_name: str, called: bool) -> Reference:
        *scopes, name = scoped_name.split("/")
        return Reference(tuple(scopes), name, called)

    def macro(self, name: str) -> Macro:
        return Macro(name)


def macro_names(value: Any) -> set[str]:
    """Returns the macros that a value refers to."""
    if isinstance(value, Macro):
        return {value.name}
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        return {name for item in value for name in macro_names(item)}
    return set()


@dataclass(kw_only=True)
class GinReader(ABC):
    """Reads files and flags, and passes their statements on; subclasses say what they mean.

    ``folders`` are those in which files and includes are searched: the current folder first.
    """

    folders: Sequence[Path]
    _open: list[Path] = field(default_factory=list)
    _files: int = 0

    @abstractmethod
    def bind(self, statement: Any, bound: Bound) -> None:
        """Takes a binding of a parameter, or of a macro, which has no ``arg_name``."""

    @abstractmethod
    def declare(self, selector: str, where: str) -> None:
        """Takes the first line of a block of bindings."""

    @abstractmethod
    def import_module(self, statement: Any, where: str) -> None:
        """Takes an import statement."""

    def read_named_file(self, name: str) -> None:
        """Reads a file of the command line; UserError if no folder has it."""
        path = self.find(name, self.folders)
        if path is None:
            searched = ", ".join(str(folder) for folder in self.folders[1:])
            beside = f" or in {searched}" if searched else "; see --gin_search_paths"
            raise UserError(f"no gin file {name!r} in the current folder{beside}")
        self.read_file(path, shown=name)

    def read_file(self, path: Path, *, shown: str) -> None:
        """Reads a file and those that it includes; UserError if one cannot be read."""
        resolved = path.resolve()
        if resolved in self._open:
            raise UserError(f"gin file {shown} includes itself")
        self._files += 1
        if self._files > _MAX_FILES:
            raise UserError(f"gin file {shown}: more than {_MAX_FILES} files are included")
        try:
            with path.open("rb") as file:
                data = file.read(_MAX_BYTES + 1)
            text = data.decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the gin file {shown}: {error}") from None
        if len(data) > _MAX_BYTES:
            raise UserError(f"the gin file {shown} is larger than {_MAX_BYTES} bytes")
        self._open.append(resolved)
        self._read(text, shown=shown)
        self._open.pop()

    def read_flag(self, binding: str) -> None:
        """Reads ``NAME=VALUE`` of the command line; UserError for anything else."""
        name, equals, _ = binding.partition("=")
        if not equals:
            raise UserError(f"--gin.{binding}: expected --gin.NAME=VALUE")
        self._read(binding, shown=f"--gin.{name.strip()}", is_flag=True)

    def _read(self, text: str, *, shown: str, is_flag: bool = False) -> None:
        for statement in _statements(text, shown=shown, is_flag=is_flag):
            where = shown if is_flag else f"{shown} line {statement.location.line_num}"
            self._take(statement, where=where, is_flag=is_flag)

    def _take(self, statement: Any, *, where: str, is_flag: bool) -> None:
        if isinstance(statement, config_parser.ImportStatement):
            self.import_module(statement, where)
        elif isinstance(statement, config_parser.IncludeStatement):
            self._include(statement.filename, where)
        elif isinstance(statement, config_parser.BlockDeclaration):
            self.declare(statement.selector, where)
        else:
            self.bind(statement, Bound(statement.value, where, is_flag))

    def _include(self, name: str, where: str) -> None:
        folders = [*self.folders, *(path.parent for path in self._open[-1:])]
        path = self.find(name, folders)
        if path is None:
            raise UserError(
                f"{where}: no file {name!r} to include in {', '.join(map(str, folders))}; "
                "see --gin_search_paths"
            )
        # A file may come from anyone, so only the user decides what else it reads.
        if not any(path.resolve().is_relative_to(folder.resolve()) for folder in folders):
            raise UserError(
                f"{where}: {name!r} is outside the current folder and the search paths; "
                "add its folder to --gin_search_paths"
            )
        self.read_file(path, shown=name)

    @staticmethod
    def find(name: str, folders: Sequence[Path]) -> Path | None:
        """Returns the file of this name in the first folder that has it; None if none has."""
        return next((path for folder in folders if (path := folder / name).is_file()), None)


def _statements(text: str, *, shown: str, is_flag: bool) -> Iterator[Any]:
    """Yields the statements of a text, one by one; UserError for the first that cannot be read."""
    line = 0
    try:
        # Not a for loop: a parser that runs out of tokens inside a statement raises StopIteration,
        # which a loop takes for the end of the file.
        parser = config_parser.ConfigParser(text, _Delegate())
        while statement := parser.parse_statement():
            line = statement.location.line_num
            yield statement
    # TypeError: a list as a key of a dictionary.
    except (SyntaxError, ValueError, TypeError, tokenize.TokenError, StopIteration) as error:
        lines = text.splitlines()
        if isinstance(error, tokenize.TokenError):
            line = error.args[1][0]
        else:
            line = getattr(error, "lineno", None) or line + 1
        line = min(line, len(lines))
        where = shown if is_flag else f"{shown} line {line}"
        shown_line = lines[line - 1].strip()[:60] if lines else ""
        raise UserError(
            f"{where}: cannot read {shown_line!r} as gin; "
            "text needs quotes (in a shell, --gin.NAME=\"'text'\")"
        ) from None
    except RecursionError:
        raise UserError(f"{shown}: brackets are nested too deeply") from None


def search_folders(search_paths: Sequence[str]) -> list[Path]:
    """Returns the current folder, then the search paths that are not empty."""
    return [Path.cwd(), *(Path(path) for path in search_paths if path)]
