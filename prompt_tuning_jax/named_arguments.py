"""Wrong calls of the public functions, told in one line what was meant."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from prompt_tuning_jax.data.suggest import suggest
from prompt_tuning_jax.errors import UserError

F = TypeVar("F", bound=Callable[..., Any])


def with_named_arguments(function: F) -> F:
    """The function, with UserError where a wrong call would have a bare TypeError."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise UserError(_meant(function, signature, args, kwargs, str(error))) from None
        return function(*args, **kwargs)

    return checked  # type: ignore[return-value]


def _meant(
    function: Callable[..., Any],
    signature: inspect.Signature,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    error: str,
) -> str:
    known = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    names = [parameter.name for parameter in known]
    called = function.__name__
    for name in kwargs:
        if name not in names:
            return f"{called} has no argument {name!r}: {suggest(name, names)}"
    by_position = [p.name for p in known if p.kind is not p.KEYWORD_ONLY]
    if len(args) > len(by_position):
        others = ", ".join(f"{name}=" for name in names if name not in by_position)
        return (
            f"{called} takes {', '.join(by_position)} by position and was given {len(args)} values"
            f"{f'; name the others: {others}' if others else ''}"
        )
    return f"{called}: {error}; it takes {', '.join(names)}"
