"""What the dataclasses of an experiment share: arguments by name, and documented fields."""

import ast
import dataclasses
import inspect
import os
import textwrap
from typing import Any, Self

from prompt_tuning_jax.errors import UserError, suggest


class Config:
    """Base of the config dataclasses, whose fields are given by name; paths become strings.

    An unknown field raises UserError with the nearest name, where a dataclass raises TypeError.
    """

    def __new__(cls, *args: Any, **fields: Any) -> Self:
        """Check the names of the fields before ``__init__`` receives them."""
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


def field_docs(cls: type) -> dict[str, str]:
    """The documentation of each field of a dataclass, by name.

    A field's documentation is the comment above it and the comment beside it in the source:
    ``--help`` and docs/configuration.md show it.  Fields without a comment have an empty text.
    """
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        lines = textwrap.dedent(inspect.getsource(base)).splitlines()
        (definition,) = ast.parse("\n".join(lines)).body
        assert isinstance(definition, ast.ClassDef)
        for node in definition.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                first = node.lineno - 1
                while lines[first - 1].strip().startswith("#"):
                    first -= 1
                comments = [line.strip() for line in lines[first : node.lineno - 1]]
                _, hash_sign, beside = lines[(node.end_lineno or node.lineno) - 1].partition("  #")
                comments += [hash_sign + beside]
                docs[node.target.id] = " ".join(c.strip().lstrip("#").strip() for c in comments)
    return {f.name: docs.get(f.name, "").strip() for f in dataclasses.fields(cls)}
