"""What the dataclasses of an experiment share: arguments by name, and documented fields."""

import ast
import dataclasses
import functools
import inspect
import os
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any, ClassVar, Self, get_type_hints

from prompt_tuning_jax.errors import UserError, suggest


class Config:
    """Base of the config dataclasses, whose fields are given by name; paths become strings.

    An unknown field raises UserError with the nearest name, where a dataclass raises TypeError.
    """

    # The smallest valid values of fields.
    lower_bounds: ClassVar[Mapping[str, float]] = {}

    def bound_errors(self, group: str) -> Iterator[str]:
        """Yields one message for each field below its bound, which is called ``GROUP.NAME``."""
        for name, low in self.lower_bounds.items():
            if (value := getattr(self, name)) < low:
                yield f"{group}.{name} is {value}; must be at least {low}"

    def __new__(cls, *args: Any, **fields: Any) -> Self:
        """Checks the names of the fields before ``__init__`` receives them."""
        known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        if args:
            raise UserError(
                f"{cls.__name__} takes its fields by name, for example {cls.__name__}"
                f"({known[0] if known else ''}=...)"
            )
        for name in fields:
            if name not in known:
                others = [
                    other.__name__
                    for other in Config.__subclasses__()
                    if name in getattr(other, "__dataclass_fields__", ())
                ]
                has_it = f"; it is a field of {' and '.join(others)}" if others else ""
                near = suggest(name, known)
                raise UserError(f"{cls.__name__} has no field {name!r}{has_it}: {near}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, os.PathLike):
                object.__setattr__(self, field.name, os.fspath(value))
            elif isinstance(value, list | tuple) and any(isinstance(x, os.PathLike) for x in value):
                plain = tuple(os.fspath(x) if isinstance(x, os.PathLike) else x for x in value)
                object.__setattr__(self, field.name, plain)


_type_hints = functools.cache(get_type_hints)


def field_types(cls: Any) -> dict[str, Any]:
    """Returns the type of each field of a dataclass, by name."""
    hints = _type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def field_docs(cls: type) -> dict[str, str]:
    """Returns the documentation of each field of a dataclass, by name.

    A field's documentation is the comment above it and the comment beside it in the source:
    ``--help`` and docs/configuration.md show it.  It begins with a capital letter, and a single
    sentence has no period.  Fields without a comment have an empty text.
    """
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            docs |= _docs_in(sys.modules[base.__module__]).get(base.__qualname__, {})
    return {f.name: docs.get(f.name, "") for f in dataclasses.fields(cls)}


@functools.cache
def _docs_in(module: ModuleType) -> dict[str, dict[str, str]]:
    """Returns the comments of annotated names in each class of a module, by qualname."""
    source = inspect.getsource(module)
    lines = source.splitlines()
    classes: dict[str, dict[str, str]] = {}

    def comment(node: ast.AnnAssign) -> str:
        first = node.lineno - 1
        while lines[first - 1].strip().startswith("#"):
            first -= 1
        beside = lines[(node.end_lineno or node.lineno) - 1].partition("  # ")[2]
        above = (line.strip().lstrip("#") for line in lines[first : node.lineno - 1])
        text = " ".join(" ".join([*above, beside]).split())
        return text[:1].upper() + (text[1:] if ". " in text else text[1:].removesuffix("."))

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                classes[prefix + child.name] = {
                    field.target.id: comment(field)
                    for field in child.body
                    if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
                }
                visit(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.FunctionDef):
                visit(child, f"{prefix}{child.name}.<locals>.")

    visit(ast.parse(source), "")
    return classes
