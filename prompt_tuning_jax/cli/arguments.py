"""Command-line arguments from dataclasses.

A command is a dataclass, and each of its fields an argument: the annotation gives the type and the
choices, the default is the option's, and the comment beside the field is the help text
(``field_docs``).  An option made with ``mirrors`` sets a field of the experiment and takes its help
text from there.
"""

import argparse
import dataclasses
import inspect
import math
import re
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass
from typing import Any, ClassVar, Literal, NoReturn, Union, get_args, get_origin

from prompt_tuning_jax.config.base import field_docs, field_types
from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.errors import UserError, suggest

# As argparse words it.
_INVALID_CHOICE = re.compile(r"(argument [^:]*: )invalid choice: '(.*)' \(choose from (.*)\)")
_SMALLEST_SHARD = 1e6  # bytes; a smaller --max_shard_size is a typo


@dataclass(frozen=True, kw_only=True)
class Command(ABC):
    """One command of ``prompt-tuning``; the docstring of a subclass is its description."""

    name: ClassVar[str]
    example: ClassVar[str]  # shown after "example: prompt-tuning"

    @abstractmethod
    def run(self) -> None:
        """Runs the command; UserError for wrong input."""

    def given(self, *names: str) -> dict[str, Any]:
        """Returns the arguments of these names that differ from their defaults."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value != defaults[name]}


def positional(metavar: str, *, default: Any = MISSING, many: bool = False) -> Any:
    """Returns a positional argument: required without a default.

    With ``many``, it takes any number of values.
    """
    nargs = "*" if many else None if default is MISSING else "?"
    return _field({"metavar": metavar, "nargs": nargs}, default, positional=True)


def option(
    metavar: str | None = None,
    *,
    default: Any = MISSING,
    flag: str | None = None,
    parse: Callable[[str], Any] | None = None,
    nargs: str | None = None,
) -> Any:
    """Returns an option: required without a default, and repeatable where the field is a list.

    Args:
      metavar: name of the value in the help text.
      default: value without the option.
      flag: spelling, where it is not the name of the field.
      parse: conversion of the text, where the annotation does not say it.
      nargs: as in argparse.
    """
    return _field({"metavar": metavar, "type": parse, "nargs": nargs}, default, flag=flag)


def mirrors(path: str, metavar: str | None = None) -> Any:
    """Returns an option that sets a field of the experiment, for example ``training.steps``."""
    return _field({"metavar": metavar}, None, mirrors=path)


def _field(kwargs: dict[str, Any], default: Any, **metadata: Any) -> Any:
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    metadata["kwargs"] = kwargs
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: [*default], metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def add_command(commands: Any, command: type[Command]) -> None:
    """Adds the parser of a command; fields of a base class with a ``group`` are listed under it."""
    description = inspect.getdoc(command) or ""
    summary = description.partition("\n")[0]
    parser = commands.add_parser(
        command.name,
        help=summary[:1].lower() + summary[1:].removesuffix("."),
        description=description.replace("``", ""),
        epilog=f"example: prompt-tuning {command.example}",
        allow_abbrev=False,
        formatter_class=_Formatter,
    )
    parser.set_defaults(command_class=command, options=parser._option_string_actions)
    fields = {field.name: field for field in dataclasses.fields(command)}
    docs, hints = field_docs(command), field_types(command)
    groups: dict[str, argparse._ActionsContainer] = {}
    # As dataclasses order fields, after those of the command: the last base comes first.
    for owner in (command, *reversed(command.__mro__[1:])):
        title = vars(owner).get("group")
        for field_name in inspect.get_annotations(owner):
            if (field := fields.pop(field_name, None)) is None:
                continue
            if title and title not in groups:
                groups[title] = parser.add_argument_group(title)
            group = groups[title] if title else parser
            _add_argument(group, field, hints[field_name], docs[field_name])


def mirrored_fields(command: type[Command]) -> dict[str, str]:
    """Returns the options of a command that set a field of the experiment: option -> field."""
    fields = dataclasses.fields(command)
    return {f.name: f.metadata["mirrors"] for f in fields if "mirrors" in f.metadata}


def _add_argument(
    group: argparse._ActionsContainer, field: dataclasses.Field[Any], annotation: Any, doc: str
) -> None:
    kwargs = dict(field.metadata.get("kwargs", {}))
    default = field.default if field.default_factory is MISSING else field.default_factory()
    if path := field.metadata.get("mirrors"):
        section, name = path.split(".")
        owner = field_types(Experiment)[section]
        annotation, doc = field_types(owner)[name], doc or field_docs(owner)[name]
        # The text is read where --set is read, which knows the types.
        kwargs = {"metavar": _METAVARS.get(annotation), **kwargs}
    else:
        kwargs |= _conversion(annotation, kwargs, default)
        if default not in (MISSING, None, False, "", 0, (), []):
            shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
            doc = f"{doc} (default: {shown})".strip()
    kwargs["help"] = doc.replace("``", "").replace("%", "%%")
    if default is not MISSING:
        kwargs["default"] = default
    if field.metadata.get("positional"):
        group.add_argument(field.name, **kwargs)
        return
    if default is MISSING:
        kwargs["required"] = True
    flag = field.metadata.get("flag") or f"--{field.name}"
    group.add_argument(flag, dest=field.name, **kwargs)


def _conversion(annotation: Any, given: dict[str, Any], default: Any) -> dict[str, Any]:
    """Returns what argparse needs for values of this type; 0 is valid where it is the default."""
    if isinstance(annotation, types.UnionType) or get_origin(annotation) is Union:
        (annotation,) = (part for part in get_args(annotation) if part is not type(None))
    if annotation is bool:
        return {"action": "store_true"}
    if get_origin(annotation) is Literal:
        return {"choices": get_args(annotation)}
    if get_origin(annotation) is list:
        return {} if given.get("nargs") else {"action": "append"}
    if get_origin(annotation) is tuple and "type" not in given:
        item = get_args(annotation)[0]
        if item is int:
            return {"metavar": "N,N", "type": numbers, **given}
        parse = _choices(get_args(item)) if get_origin(item) is Literal else names
        return {"metavar": "A,B", "type": parse, **given}
    if annotation is int:
        parse_number = non_negative if default == 0 else positive
        return {"metavar": "N", "type": parse_number, **given}
    if annotation is float:
        return {"metavar": "X", "type": positive_number, **given}
    return {}


_METAVARS = {int: "N", float: "X"}


def names(text: str) -> tuple[str, ...]:
    """Returns ``a,b`` as names."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def numbers(text: str) -> tuple[int, ...]:
    """Returns ``32,64`` as numbers."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 32,64,128")
    return tuple(map(int, text.split(",")))


def _choices(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        for name in names(text):
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is invalid: {suggest(name, known)}")
        return names(text)

    return parse


def positive(text: str) -> int:
    """Returns a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def positive_number(text: str) -> float:
    """Returns a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def non_negative(text: str) -> int:
    """Returns a whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def port(text: str) -> int:
    """Returns a port number, where 0 means any free port."""
    if not re.fullmatch(r"\d{1,5}", text) or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, a number from 0 to 65535")
    return int(text)


def size(text: str) -> int:
    """Returns ``500MB`` as bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMG]?)B?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB or 2GB")
    number = float(match[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[match[2]]
    if number < _SMALLEST_SHARD:
        raise argparse.ArgumentTypeError(f"{text!r} is less than 1MB")
    return int(number)


class _Formatter(argparse.HelpFormatter):
    """Keeps the paragraphs of a description apart."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.split("\n\n")
        return "\n\n".join(super(_Formatter, self)._fill_text(p, width, indent) for p in paragraphs)


class Parser(argparse.ArgumentParser):
    """Raises UserError with one line that says what is wrong and what was probably meant."""

    _arguments: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse; remembers the arguments for ``error``."""
        self._arguments = args or ()
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raises UserError.

        A mistyped option comes before an argument that is therefore missing.
        """
        options = [name for name in self._option_string_actions if name.startswith("--")]
        for arg in self._arguments:
            if self._subparsers is not None and not arg.startswith("-"):
                break  # a command, which has options of its own
            name = arg.partition("=")[0]
            if name.startswith("--") and name != "--" and name not in options:
                raise UserError(f"unknown argument {name!r}: {suggest(name, options)}")
        if invalid := _INVALID_CHOICE.fullmatch(message):
            choices = re.findall(r"[^\s',]+", invalid[3])
            near = suggest(invalid[2], choices, most=len(choices))
            message = f"{invalid[1]}invalid choice: {invalid[2]!r}: {near}"
        raise UserError(f"{message}; see {self.prog} --help")
