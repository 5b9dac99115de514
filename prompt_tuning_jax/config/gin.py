"""Experiments from gin files and bindings, as T5X users write them.

The configurables are ``Experiment``, its groups (``Model``, ``Data``, ``Optimizer``, ...) and the
methods, each by its class name.

gin's parser reads the files, and this module resolves the bindings.  gin's ``parse_config`` would
execute the ``import`` statements of a file, open any file that it includes, and change the global
config of the program.  Here a gin file needs no trust, errors name the file and the line, and an
experiment never sees the bindings of another.
"""

import tokenize
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from gin import config_parser

from prompt_tuning_jax.config.base import field_types
from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.config.methods import METHODS
from prompt_tuning_jax.config.overrides import CLASS, from_dict, group_classes
from prompt_tuning_jax.errors import UserError, suggest

_MAX_BYTES = 2**20  # of a gin file
_REQUIRED = "gin.REQUIRED"
_MODULES = ("", "prompt_tuning_jax", Experiment.__module__)


def experiment_from_gin(
    gin_files: Sequence[str],
    bindings: Sequence[str] = (),
    search_paths: Sequence[str] = (),
) -> Experiment:
    """The experiment that gin files, then bindings, describe; later bindings win.

    Args:
      gin_files: paths relative to the current folder or to a search path.
      bindings: ``NAME=VALUE`` of a macro or a parameter, for example
        ``Optimizer.learning_rate=0.1``.
      search_paths: folders to search for gin files and the files that they include.

    Raises:
      UserError: for a syntax error, an import, an unknown name, a value of another type, a macro
        that is missing or unused, and a binding without effect.
    """
    folders = [Path.cwd(), *(Path(path) for path in search_paths if path)]
    reader = _Reader(folders=folders)
    for name in gin_files:
        path = _find(name, folders)
        if path is None:
            searched = ", ".join(str(folder) for folder in folders[1:])
            beside = f" or in {searched}" if searched else "; see --gin_search_paths"
            raise UserError(f"no gin file {name!r} in the current folder{beside}")
        reader.read_file(path, shown=name)
    for binding in bindings:
        reader.read_flag(binding)
    reader.check_macros_used()
    resolver = _Resolver(reader.bindings, reader.macros)
    experiment = from_dict(resolver.experiment())
    resolver.check_flags_used()
    return experiment


@dataclass(frozen=True)
class _Macro:
    """``%name``."""

    name: str


@dataclass(frozen=True)
class _Reference:
    """``@scopes/name()``; without the parentheses, the class itself."""

    scopes: tuple[str, ...]
    name: str
    called: bool

    def __repr__(self) -> str:
        return f"@{'/'.join((*self.scopes, self.name))}{'()' if self.called else ''}"


@dataclass(frozen=True)
class _Bound:
    value: Any
    where: str
    is_flag: bool


@dataclass(frozen=True, order=True)
class _Key:
    """``scope/configurable.parameter``."""

    scope: str
    name: str
    parameter: str

    def __str__(self) -> str:
        return f"{self.scope}/{self.name}.{self.parameter}".removeprefix("/")


class _Delegate(config_parser.ParserDelegate):
    def configurable_reference(self, scoped_name: str, called: bool) -> _Reference:
        *scopes, name = scoped_name.split("/")
        return _Reference(tuple(scopes), name, called)

    def macro(self, name: str) -> _Macro:
        return _Macro(name)


def _configurables() -> dict[str, type]:
    hints = field_types(Experiment)
    classes = [cls for annotation in hints.values() for cls in group_classes(annotation)]
    return {cls.__name__: cls for cls in (Experiment, *classes)}


def _method_names() -> set[str]:
    return {cls.__name__ for cls in METHODS.values()}


def _configurable(selector: str, where: str) -> str:
    """The class name of a selector, which may begin with this package or the class's module."""
    module, _, name = selector.rpartition(".")
    known = _configurables()
    if name not in known or module not in (*_MODULES, known[name].__module__):
        raise UserError(f"{where}: unknown configurable {selector!r}: {suggest(name, known)}")
    return name


def _find(name: str, folders: Sequence[Path]) -> Path | None:
    return next((path for folder in folders if (path := folder / name).is_file()), None)


@dataclass(kw_only=True)
class _Reader:
    """Reads statements into bindings; the last binding of a name wins.

    ``mentioned`` holds every macro that a value refers to, even if a later binding replaced the
    value: such a macro is not an error.
    """

    folders: list[Path]
    bindings: dict[_Key, _Bound] = field(default_factory=dict)
    macros: dict[str, _Bound] = field(default_factory=dict)
    mentioned: set[str] = field(default_factory=set)
    _open: list[Path] = field(default_factory=list)

    def read_file(self, path: Path, *, shown: str) -> None:
        resolved = path.resolve()
        if resolved in self._open:
            raise UserError(f"gin file {shown} includes itself")
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
        name, equals, _ = binding.partition("=")
        if not equals:
            raise UserError(f"--gin.{binding}: expected --gin.NAME=VALUE")
        self._read(binding, shown=f"--gin.{name.strip()}", is_flag=True)

    def check_macros_used(self) -> None:
        """UserError for a macro that no value refers to, which may be a typo."""
        for name, bound in self.macros.items():
            if name not in self.mentioned:
                known = sorted(self.mentioned - {_REQUIRED})
                raise UserError(
                    f"{bound.where}: nothing uses the macro {name!r}: {suggest(name, known)}"
                )

    def _read(self, text: str, *, shown: str, is_flag: bool = False) -> None:
        line = 0
        try:
            # Not a for loop: a parser that runs out of tokens inside a statement raises
            # StopIteration, which a loop takes for the end of the file.
            parser = config_parser.ConfigParser(text, _Delegate())
            while statement := parser.parse_statement():
                line = statement.location.line_num
                where = shown if is_flag else f"{shown} line {line}"
                self._read_statement(statement, where=where, is_flag=is_flag)
        except (SyntaxError, ValueError, tokenize.TokenError, StopIteration) as error:
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

    def _read_statement(self, statement: Any, *, where: str, is_flag: bool) -> None:
        if isinstance(statement, config_parser.ImportStatement):
            raise UserError(
                f"{where}: gin files may not import anything ({statement.format()!r}); remove the "
                f"line, because these need no import: {', '.join(_configurables())}"
            )
        if isinstance(statement, config_parser.IncludeStatement):
            self._include(statement.filename, where)
        elif isinstance(statement, config_parser.BlockDeclaration):
            _configurable(statement.selector, where)
        else:
            self._bind(statement, _Bound(statement.value, where, is_flag))

    def _bind(self, statement: Any, bound: _Bound) -> None:
        scope, selector, parameter = statement.scope, statement.selector, statement.arg_name
        self.mentioned |= _macro_names(bound.value)
        if not parameter:
            if selector in _configurables():
                raise UserError(f"{bound.where}: set a parameter, as in {selector}.NAME")
            self.macros[f"{scope}/{selector}".removeprefix("/")] = bound
            return
        name = _configurable(selector, bound.where)
        parameters = [f.name for f in fields(_configurables()[name])]
        if parameter not in parameters:
            near = suggest(parameter, parameters)
            raise UserError(f"{bound.where}: {name} has no parameter {parameter!r}: {near}")
        if (name, parameter) == ("Data", "module") and bound.value and not bound.is_flag:
            raise UserError(
                f"{bound.where}: gin files may not import anything; name the module on the command "
                f"line, --set data.module={bound.value}"
            )
        self.bindings[_Key(scope, name, parameter)] = bound

    def _include(self, name: str, where: str) -> None:
        folders = [*self.folders, *(path.parent for path in self._open[-1:])]
        path = _find(name, folders)
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


class _Resolver:
    """Follows macros and references, from ``Experiment`` down."""

    def __init__(self, bindings: Mapping[_Key, _Bound], macros: Mapping[str, _Bound]):
        self._bindings = bindings
        self._macros = macros
        self._used: set[_Key] = set()

    def experiment(self) -> dict[str, Any]:
        """The fields of an Experiment, for ``from_dict``, with groups that have no binding."""
        values = self._parameters(_Reference((), Experiment.__name__, True))
        defaults = Experiment()
        for section in fields(Experiment):
            name = type(getattr(defaults, section.name)).__name__
            value = values.get(section.name, _Reference((), name, True))
            where = self._where(section.name)
            if not isinstance(value, _Reference) or not value.called:
                raise UserError(
                    f"{where}: Experiment.{section.name} is {value!r}; write @{name}(), with the "
                    "parentheses"
                )
            cls = _configurable(value.name, where)
            value = _Reference(value.scopes, cls, True)
            values[section.name] = {CLASS: cls, **self._parameters(value)}
        return values

    def check_flags_used(self) -> None:
        """UserError for a ``--gin.NAME=VALUE`` that has no effect."""
        for key, bound in self._bindings.items():
            if bound.is_flag and key not in self._used:
                used = str(key).rpartition(".")[0]
                group = "method" if key.name in _method_names() else key.name.lower()
                raise UserError(
                    f"{bound.where}: {key} has no effect, because nothing refers to @{used}(); add "
                    f"--gin.Experiment.{group}='@{used}()' to use it"
                )

    def _where(self, section: str) -> str:
        bound = self._bindings.get(_Key("", Experiment.__name__, section))
        return bound.where if bound else section

    def _parameters(self, reference: _Reference) -> dict[str, Any]:
        """The values bound to a configurable; an inner scope wins over an outer one."""
        keys: dict[str, _Key] = {}
        for depth in range(len(reference.scopes) + 1):
            scope = "/".join(reference.scopes[:depth])
            for key in self._bindings:
                if (key.scope, key.name) == (scope, reference.name):
                    keys[key.parameter] = key
        self._used.update(keys.values())
        return {
            name: self._value(self._bindings[key].value, str(key), self._bindings[key].where)
            for name, key in keys.items()
        }

    def _value(self, value: Any, name: str, where: str, within: tuple[str, ...] = ()) -> Any:
        """The value, bound to ``name``, with its macros replaced."""
        if isinstance(value, list | tuple):
            return [self._value(item, name, where, within) for item in value]
        if not isinstance(value, _Macro):
            return value
        if value.name == _REQUIRED:
            raise UserError(f"{where}: {name} must be given, with --gin.{name}=VALUE")
        if value.name in within:
            raise UserError(f"{where}: the macro {value.name!r} refers to itself")
        bound = self._macros.get(value.name)
        if bound is None:
            raise UserError(
                f"{where}: the macro {value.name!r} has no value: "
                f"{suggest(value.name, sorted(self._macros))}"
            )
        return self._value(bound.value, value.name, bound.where, (*within, value.name))


def _macro_names(value: Any) -> set[str]:
    if isinstance(value, _Macro):
        return {value.name}
    if isinstance(value, list | tuple):
        return {name for item in value for name in _macro_names(item)}
    return set()
