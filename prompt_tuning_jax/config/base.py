"""What all dataclasses of an experiment share: they say which field was meant."""

import dataclasses
import os
from typing import Any, Self

from prompt_tuning_jax.errors import UserError, suggest


class Config:
    """Base of dataclasses whose fields are given by name; paths become texts.

    UserError, where a dataclass has a bare TypeError, for a field that there is not.
    """

    def __new__(cls, *args: Any, **fields: Any) -> Self:
        """Looks at the names of the fields, which ``__init__`` is given next."""
        known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        if args:
            raise UserError(
                f"{cls.__name__} takes its fields by name, as in {cls.__name__}"
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
