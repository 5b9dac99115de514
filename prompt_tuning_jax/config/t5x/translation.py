"""A translation in progress: fields of an experiment, and bindings without a counterpart."""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from prompt_tuning_jax.config.gin_syntax import Reference
from prompt_tuning_jax.config.t5x.launch import Launch, Value
from prompt_tuning_jax.errors import UserError

# The command that does what a launch does.
LaunchCommand = Literal["train", "eval", "predict", "plan"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A field of the experiment, the binding that it comes from, and how its meaning differs."""

    value: Any
    source: str = ""
    remark: str = ""


@dataclass(frozen=True, kw_only=True)
class Remark:
    """A binding that the config does not express as it is, and why.

    ``kind``: ``changed`` where a field has another meaning, ``missing`` where the launch leaves a
    required value open, and ``lost`` where nothing corresponds.
    """

    kind: Literal["changed", "missing", "lost"]
    binding: str
    where: str
    text: str


@dataclass(kw_only=True)
class Translation:
    """The fields that were translated so far, and what was left over."""

    launch: Launch
    command: LaunchCommand = "train"
    method: str = ""  # class of the method
    settings: dict[str, dict[str, Setting]] = field(default_factory=dict)
    remarks: list[Remark] = field(default_factory=list)
    # Options of the command that no field of the experiment holds.
    options: list[str] = field(default_factory=list)
    # Bindings that need no field, by the reason.
    same: Counter[str] = field(default_factory=Counter)

    def set(
        self,
        path: str,
        value: Any,
        source: Value | None = None,
        *,
        remark: str = "",
        default: str = "",
    ) -> None:
        """Sets a field, such as ``training.steps``; ``default`` names a default of T5X's."""
        group, _, name = path.partition(".")
        text = str(source) if source else default
        self.settings.setdefault(group, {})[name] = Setting(value=value, source=text, remark=remark)
        if remark:
            where = source.where if source else ""
            self._add("changed", text or path, where, f"{path}={value!r}; {remark}")

    def value(self, path: str, default: Any = None) -> Any:
        """Returns the value of a field that was set, or the default."""
        group, _, name = path.partition(".")
        setting = self.settings.get(group, {}).get(name)
        return default if setting is None else setting.value

    def lost(self, source: Value | None, text: str) -> None:
        """Notes that nothing corresponds to a binding."""
        if source:
            self._add("lost", str(source), source.where, text)

    def missing(self, source: Value, field_name: str) -> None:
        """Notes a value that the launch must give and does not."""
        self._add("missing", source.name, source.where, f"not given; set {field_name}")

    def same_here(self, source: Value | None, text: str) -> None:
        """Notes that a binding needs no field."""
        if source:
            self.same[text] += 1

    def get(
        self, reference: Reference | None, parameter: str, field_name: str = ""
    ) -> Value | None:
        """Returns a value that is bound and given.

        Notes a missing one if a field corresponds to it.
        """
        value = self.launch.get(reference, parameter)
        if value is None or not value.is_missing:
            return value
        if field_name:
            self.missing(value, field_name)
        return None

    def expect(
        self, reference: Reference | None, parameter: str, *values: Any, same: str, lost: str
    ) -> None:
        """Notes a binding as the same here if it has one of the values, and as lost otherwise."""
        if (value := self.get(reference, parameter)) is None:
            return
        if value.value in values:
            self.same_here(value, same)
        else:
            self.lost(value, lost)

    def _add(self, kind: Literal["changed", "missing", "lost"], *texts: str) -> None:
        remark = Remark(kind=kind, binding=texts[0], where=texts[1], text=texts[2])
        if remark not in self.remarks:
            self.remarks.append(remark)


def number(value: Value, *, whole: bool = False) -> Any:
    """Returns the number of a value; UserError with its place for anything else."""
    kinds = (int,) if whole else (int, float)
    is_number = isinstance(value.value, kinds) and not isinstance(value.value, bool)
    if not is_number or not math.isfinite(value.value):
        raise UserError(
            f"{value.where}: {value.name} is {value.value!r}; expected a "
            f"{'whole number' if whole else 'number'}"
        )
    return value.value


def whole_numbers(value: Value) -> tuple[int, ...]:
    """Returns the whole numbers of a list; UserError with its place for anything else."""
    items = value.value if isinstance(value.value, list | tuple) else [None]
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
        raise UserError(
            f"{value.where}: {value.name} is {value.value!r}; expected a list of whole numbers"
        )
    return tuple(items)


def text(value: Value) -> str:
    """Returns the text of a value; UserError with its place for anything else."""
    if not isinstance(value.value, str):
        raise UserError(f"{value.where}: {value.name} is {value.value!r}; expected text")
    return value.value


def texts(value: Value) -> tuple[str, ...]:
    """Returns the texts of a list; UserError with its place for anything else."""
    if not isinstance(value.value, list | tuple) or not all(
        isinstance(v, str) for v in value.value
    ):
        raise UserError(f"{value.where}: {value.name} is {value.value!r}; expected a list of texts")
    return tuple(value.value)
