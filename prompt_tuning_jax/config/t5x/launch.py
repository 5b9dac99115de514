"""What the gin files and flags of a launch of T5X bind.

The names of configurables are data: nothing that a file imports is imported, and nothing that it
refers to is called.  A file's imports say what its short names stand for, as in gin's dynamic
registration: ``utils.DatasetConfig`` is ``t5x.utils.DatasetConfig`` where the file has ``from t5x
import utils``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prompt_tuning_jax.config.gin_syntax import (
    MAX_ITEMS,
    REQUIRED,
    Bound,
    GinReader,
    Key,
    Macro,
    Reference,
    macro_names,
    search_folders,
)
from prompt_tuning_jax.errors import UserError

_MAX_SHOWN = 60  # characters of a value
_DYNAMIC = "__gin__"  # gin's own module, which files import to switch it on


@dataclass(frozen=True, kw_only=True)
class Value:
    """A bound value with its macros replaced, and the binding that gives it.

    ``name`` is spelled as in the file: the innermost macro, or ``scope/configurable.parameter``.
    A missing value is one that gin requires, or a macro that no file defines.
    """

    value: Any
    name: str
    where: str
    is_flag: bool
    is_missing: bool = False

    def __str__(self) -> str:
        text = "%gin.REQUIRED" if self.is_missing else repr(self.value)
        return f"{self.name} = {text if len(text) <= _MAX_SHOWN else f'{text[:_MAX_SHOWN]}...'}"


def read_launch(
    gin_files: Sequence[str],
    bindings: Sequence[str] = (),
    search_paths: Sequence[str] = (),
) -> "Launch":
    """Reads gin files, then bindings; the last binding of a name wins.

    Raises:
      UserError: for a file that is missing, outside the folders, or not gin, and for a name that
        could be either of two configurables.
    """
    reader = _Reader(folders=search_folders(search_paths))
    for name in gin_files:
        reader.read_named_file(name)
    for binding in bindings:
        reader.read_flag(binding)
    return Launch(bindings=reader.bindings, macros=reader.macros, spelled=reader.spelled)


@dataclass(kw_only=True)
class Launch:
    """Bindings by the whole names of their configurables; remembers which ones were read."""

    bindings: dict[Key, Bound]
    macros: dict[str, Bound]
    spelled: dict[Key, str]
    _read: set[Key] = field(default_factory=set)
    _read_macros: set[str] = field(default_factory=set)
    _items: int = 0

    def get(self, reference: Reference | None, parameter: str) -> Value | None:
        """Returns the value of a parameter where a reference is called; None if it is not bound.

        An inner scope wins over an outer one.  References in the value are called in the same
        scope, unless they name their own.
        """
        if reference is None:
            return None
        binding = None
        for depth in range(len(reference.scopes) + 1):
            key = Key("/".join(reference.scopes[:depth]), reference.name, parameter)
            if key in self.bindings:
                self._read.add(key)
                binding = key
        if binding is None:
            return None
        return self._value(self.bindings[binding], self.spelled[binding], reference.scopes)

    def reference(self, reference: Reference | None, parameter: str) -> Reference | None:
        """As ``get``, where the value is a reference; None for any other value."""
        value = self.get(reference, parameter)
        return value.value if value and isinstance(value.value, Reference) else None

    def macro(self, name: str) -> Value | None:
        """Returns the value of a macro; None if it has none."""
        if name not in self.macros:
            return None
        self._read_macros.add(name)
        return self._value(self.macros[name], name, ())

    def binds(self, name: str) -> bool:
        """Returns whether a parameter of this configurable is bound."""
        return any(key.name == name for key in self.bindings)

    def refers_to(self, name: str) -> bool:
        """Returns whether a value refers to this configurable."""
        bound = (*self.bindings.values(), *self.macros.values())
        return any(name in _referred(one.value) for one in bound)

    def unread(self) -> list[tuple[str, Value]]:
        """Returns the bindings that ``get`` did not return.

        Keys are ``configurable.parameter``.
        """
        return [
            (f"{key.name}.{key.parameter}", self._value(bound, self.spelled[key], ()))
            for key, bound in self.bindings.items()
            if key not in self._read
        ]

    def unused_macros(self) -> list[Value]:
        """Returns the macros that no value refers to, and that were not read."""
        bound = (*self.bindings.values(), *self.macros.values())
        mentioned = {name for one in bound for name in macro_names(one.value)}
        unused = [m for m in self.macros if m not in mentioned | self._read_macros]
        return [self._value(self.macros[name], name, ()) for name in unused]

    def _value(self, bound: Bound, name: str, scopes: tuple[str, ...]) -> Value:
        seen = {name}
        while isinstance(bound.value, Macro) and bound.value.name in self.macros:
            name = bound.value.name
            if name in seen:
                raise UserError(f"{bound.where}: the macro {name!r} refers to itself")
            seen.add(name)
            bound = self.macros[name]
        missing = isinstance(bound.value, Macro)
        if missing and bound.value.name != REQUIRED:
            name = bound.value.name
        value = None if missing else self._replaced(bound.value, scopes, (name,))
        return Value(
            value=value, name=name, where=bound.where, is_flag=bound.is_flag, is_missing=missing
        )

    def _replaced(self, value: Any, scopes: tuple[str, ...], within: tuple[str, ...]) -> Any:
        self._items += 1
        if self._items > MAX_ITEMS:
            raise UserError(f"the values of {within[0]} and of others have too many items")
        if isinstance(value, list | tuple):
            return type(value)(self._replaced(item, scopes, within) for item in value)
        if isinstance(value, dict):
            return {key: self._replaced(item, scopes, within) for key, item in value.items()}
        if isinstance(value, Reference):
            return Reference(value.scopes or scopes, value.name, value.called)
        if not isinstance(value, Macro):
            return value
        if value.name in within:
            raise UserError(f"{self.macros[value.name].where}: {value!r} refers to itself")
        bound = self.macros.get(value.name)
        return None if bound is None else self._replaced(bound.value, scopes, (*within, value.name))


def _referred(value: Any) -> set[str]:
    if isinstance(value, Reference):
        return {value.name}
    if isinstance(value, dict):
        value = [*value.values()]
    if isinstance(value, list | tuple):
        return {name for item in value for name in _referred(item)}
    return set()


@dataclass(kw_only=True)
class _Reader(GinReader):
    """Reads bindings, with each configurable by its whole name."""

    bindings: dict[Key, Bound] = field(default_factory=dict)
    macros: dict[str, Bound] = field(default_factory=dict)
    spelled: dict[Key, str] = field(default_factory=dict)
    # For each file that is open, its short names of modules.
    _aliases: list[dict[str, str]] = field(default_factory=lambda: [{}])
    # Every name by which a configurable can be called, and its whole name.
    _names: dict[str, str] = field(default_factory=dict)
    # Paths of modules with the short names that files gave them.
    _partial: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def find(name: str, folders: Sequence[Path]) -> Path | None:
        """As in the base class; a file of the original includes another in wrong case, XXL.gin."""
        paths = [folder / name for folder in folders]
        paths += [path.with_name(path.name.lower()) for path in paths]
        return next((path for path in paths if path.is_file()), None)

    def read_file(self, path: Path, *, shown: str) -> None:
        self._aliases.append({})
        super().read_file(path, shown=shown)
        self._aliases.pop()

    def import_module(self, statement: Any, where: str) -> None:
        module = statement.module
        if module.partition(".")[0] == _DYNAMIC:
            return
        bare = not statement.is_from and not statement.alias
        whole = module.partition(".")[0] if bare else module
        self._aliases[-1][statement.bound_name()] = whole
        self._partial[whole] = statement.partial_path()

    def declare(self, selector: str, where: str) -> None:
        self._whole(selector, where)

    def bind(self, statement: Any, bound: Bound) -> None:
        value = self._with_whole_names(bound.value, bound.where)
        bound = Bound(value, bound.where, bound.is_flag)
        scope, selector, parameter = statement.scope, statement.selector, statement.arg_name
        if not parameter:
            self.macros[f"{scope}/{selector}".removeprefix("/")] = bound
            return
        key = Key(scope, self._whole(selector, bound.where), parameter)
        # Of equal bindings the last one counts, and the order is that of the last ones.
        self.bindings.pop(key, None)
        self.bindings[key] = bound
        self.spelled[key] = f"{scope}/{selector}.{parameter}".removeprefix("/")

    def _with_whole_names(self, value: Any, where: str) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(self._with_whole_names(item, where) for item in value)
        if isinstance(value, dict):
            return {key: self._with_whole_names(item, where) for key, item in value.items()}
        if isinstance(value, Reference):
            return Reference(value.scopes, self._whole(value.name, where), value.called)
        return value

    def _whole(self, selector: str, where: str) -> str:
        """Returns the whole name of a configurable; the selector itself where nothing says more."""
        first, dot, rest = selector.partition(".")
        module = self._aliases[-1].get(first)
        if dot and module is not None:
            whole = f"{module}.{rest}"
            self._names[whole] = whole
            self._names[f"{self._partial[module]}.{rest}"] = whole
            return whole
        matches = {
            whole
            for name, whole in self._names.items()
            if name == selector or name.endswith(f".{selector}")
        }
        if len(matches) > 1:
            raise UserError(
                f"{where}: {selector!r} could be {' or '.join(sorted(matches))}; write its "
                "whole name"
            )
        whole = matches.pop() if matches else selector
        self._names[whole] = whole
        return whole
