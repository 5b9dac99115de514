"""Experiments from gin files and bindings, as T5X users write them.

The configurables are ``Experiment``, its groups (``Model``, ``Data``, ``Optimizer``, ...) and the
methods, each by its class name.

``gin_syntax`` reads the files, and this module resolves the bindings.  A gin file needs no trust,
and an experiment never sees the bindings of another.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from prompt_tuning_jax.config.base import field_types
from prompt_tuning_jax.config.experiment import Experiment
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
from prompt_tuning_jax.config.methods import METHODS
from prompt_tuning_jax.config.overrides import CLASS, from_dict, group_classes
from prompt_tuning_jax.config.t5x.flags import (
    T5X_MACROS,
    USE_IMPORT_GIN,
    fields_of_t5x_flags,
    is_t5x_module,
    note_pretraining_steps,
)
from prompt_tuning_jax.errors import UserError, suggest

_MODULES = ("", "prompt_tuning_jax", Experiment.__module__)
_DEEPEST = 100  # macros that refer to each other


def experiment_from_gin(
    gin_files: Sequence[str],
    bindings: Sequence[str] = (),
    search_paths: Sequence[str] = (),
) -> Experiment:
    """Returns the experiment that gin files, then bindings, describe; later bindings win.

    Args:
      gin_files: paths relative to the current folder or to a search path.
      bindings: ``NAME=VALUE`` of a macro or a parameter, for example
        ``Optimizer.learning_rate=0.1``.
      search_paths: folders to search for gin files and the files that they include.

    Raises:
      UserError: for a syntax error, an import, an unknown name, a value of another type, a macro
        that is missing or unused, and a binding without effect.  A flag with one of T5X's macros
        sets the fields that correspond to it.
    """
    reader = _Reader(folders=search_folders(search_paths))
    for name in gin_files:
        reader.read_named_file(name)
    for binding in bindings:
        reader.read_flag(binding)
    flags = reader.take_t5x_flags()
    reader.check_macros_used()
    resolver = _Resolver(reader.bindings, reader.macros)
    values = resolver.experiment()
    for path, value in fields_of_t5x_flags(flags).items():
        group, _, name = path.partition(".")
        values[group][name] = value
    note_pretraining_steps({**reader.flags(), **flags}, values)
    try:
        experiment = from_dict(values)
    except UserError as error:
        where = resolver.where_of.get(str(error).partition(":")[0])
        raise UserError(f"{where}: {error}") if where else error from None
    resolver.check_flags_used()
    return experiment


def _configurables() -> dict[str, type]:
    hints = field_types(Experiment)
    classes = [cls for annotation in hints.values() for cls in group_classes(annotation)]
    return {cls.__name__: cls for cls in (Experiment, *classes)}


def _method_names() -> set[str]:
    return {cls.__name__ for cls in METHODS.values()}


def _configurable(selector: str, where: str) -> str:
    """Returns the class name of a selector.

    A selector may begin with this package or the class's module.
    """
    module, _, name = selector.rpartition(".")
    known = _configurables()
    if name not in known or module not in (*_MODULES, known[name].__module__):
        near = f"unknown configurable {selector!r}: {suggest(name, known)}"
        # Names of this package need no module; those of T5X always have one.
        of_t5x = f"; if the file is one of T5X, {USE_IMPORT_GIN}" if module else ""
        raise UserError(f"{where}: {near}{of_t5x}")
    return name


@dataclass(kw_only=True)
class _Reader(GinReader):
    """Reads statements into bindings; the last binding of a name wins.

    ``mentioned`` holds every macro that a value refers to, even if a later binding replaced the
    value: such a macro is not an error.
    """

    bindings: dict[Key, Bound] = field(default_factory=dict)
    macros: dict[str, Bound] = field(default_factory=dict)
    mentioned: set[str] = field(default_factory=set)

    def flags(self) -> dict[str, Bound]:
        """Returns the macros that flags set."""
        return {name: bound for name, bound in self.macros.items() if bound.is_flag}

    def take_t5x_flags(self) -> dict[str, Bound]:
        """Takes out the flags with T5X's macros that no value refers to: they set fields."""
        names = self.flags().keys() & T5X_MACROS.keys() - self.mentioned
        return {name: self.macros.pop(name) for name in sorted(names)}

    def check_macros_used(self) -> None:
        """Raises UserError for a macro that no value refers to, which may be a typo."""
        for name, bound in self.macros.items():
            if name not in self.mentioned:
                known = sorted(self.mentioned - {REQUIRED})
                near = suggest(name, sorted({*known, *T5X_MACROS}) if bound.is_flag else known)
                of_t5x = (
                    "" if known or bound.is_flag else f"; if the file is T5X's, {USE_IMPORT_GIN}"
                )
                raise UserError(f"{bound.where}: nothing uses the macro {name!r}: {near}{of_t5x}")

    def import_module(self, statement: Any, where: str) -> None:
        if is_t5x_module(statement.module):
            raise UserError(f"{where}: this is a gin file of T5X; {USE_IMPORT_GIN}")
        raise UserError(
            f"{where}: gin files may not import anything ({statement.format()!r}); remove the "
            f"line, because these need no import: {', '.join(_configurables())}"
        )

    def declare(self, selector: str, where: str) -> None:
        _configurable(selector, where)

    def bind(self, statement: Any, bound: Bound) -> None:
        scope, selector, parameter = statement.scope, statement.selector, statement.arg_name
        self.mentioned |= macro_names(bound.value)
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
        self.bindings[Key(scope, name, parameter)] = bound


class _Resolver:
    """Follows macros and references, from ``Experiment`` down."""

    def __init__(self, bindings: Mapping[Key, Bound], macros: Mapping[str, Bound]):
        self._bindings = bindings
        self._macros = macros
        self._used: set[Key] = set()
        self._items = 0
        self.where_of: dict[str, str] = {}  # the file and line, or the flag, that set a field

    def experiment(self) -> dict[str, Any]:
        """Returns the fields of an Experiment, for ``from_dict``.

        Groups without a binding are included.
        """
        values = self._parameters(Reference((), Experiment.__name__, True))
        defaults = Experiment()
        for section in fields(Experiment):
            name = type(getattr(defaults, section.name)).__name__
            value = values.get(section.name, Reference((), name, True))
            where = self._where(section.name)
            if not isinstance(value, Reference) or not value.called:
                raise UserError(
                    f"{where}: Experiment.{section.name} is {value!r}; write @{name}(), with the "
                    "parentheses"
                )
            cls = _configurable(value.name, where)
            value = Reference(value.scopes, cls, True)
            values[section.name] = {CLASS: cls, **self._parameters(value, section.name)}
        return values

    def check_flags_used(self) -> None:
        """Raises UserError for a ``--gin.NAME=VALUE`` that has no effect."""
        for key, bound in self._bindings.items():
            if bound.is_flag and key not in self._used:
                used = str(key).rpartition(".")[0]
                group = "method" if key.name in _method_names() else key.name.lower()
                raise UserError(
                    f"{bound.where}: {key} has no effect, because nothing refers to @{used}(); add "
                    f"--gin.Experiment.{group}='@{used}()' to use it"
                )

    def _where(self, section: str) -> str:
        bound = self._bindings.get(Key("", Experiment.__name__, section))
        return bound.where if bound else section

    def _parameters(self, reference: Reference, section: str = "") -> dict[str, Any]:
        """Returns the values bound to a configurable; an inner scope wins over an outer one."""
        keys: dict[str, Key] = {}
        for depth in range(len(reference.scopes) + 1):
            scope = "/".join(reference.scopes[:depth])
            for key in self._bindings:
                if (key.scope, key.name) == (scope, reference.name):
                    keys[key.parameter] = key
        self._used.update(keys.values())
        self.where_of |= {f"{section}.{n}": self._bindings[key].where for n, key in keys.items()}
        return {
            name: self._value(self._bindings[key].value, str(key), self._bindings[key].where)
            for name, key in keys.items()
        }

    def _value(self, value: Any, name: str, where: str, within: tuple[str, ...] = ()) -> Any:
        """Returns the value, bound to ``name``, with its macros replaced."""
        self._items += 1
        if self._items > MAX_ITEMS:
            raise UserError(f"{where}: {name} has too many items")
        if isinstance(value, list | tuple):
            return [self._value(item, name, where, within) for item in value]
        if not isinstance(value, Macro):
            return value
        if value.name == REQUIRED:
            raise UserError(f"{where}: {name} must be given, with --gin.{name}=VALUE")
        if len(within) > _DEEPEST:
            raise UserError(f"{where}: more than {_DEEPEST} macros lead to {name}")
        if value.name in within:
            raise UserError(f"{where}: the macro {value.name!r} refers to itself")
        bound = self._macros.get(value.name)
        if bound is None:
            raise UserError(
                f"{where}: the macro {value.name!r} has no value: "
                f"{suggest(value.name, sorted(self._macros))}"
            )
        return self._value(bound.value, value.name, bound.where, (*within, value.name))
