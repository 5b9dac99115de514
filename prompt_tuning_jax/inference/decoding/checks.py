"""Argument checks, whose one-line errors name the argument and its value."""

import math
import numbers

from prompt_tuning_jax.errors import UserError

_MOST = 2**31 - 1  # the largest int32, the integer type on devices


def whole_number(name: str, value: object, *, at_least: int, at_most: int = _MOST) -> int:
    """Returns the value as an int; raises UserError if it is not an integer or out of bounds."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise UserError(f"{name} is {_shown(value)}; it must be a whole number")
    number = int(value)
    if number < at_least:
        raise UserError(f"{name} is {number}; it must be at least {at_least}")
    if number > at_most:
        raise UserError(f"{name} is {_shown(number)}; it must be at most {at_most:,}")
    return number


def real_number(
    name: str, value: object, *, above: float = -math.inf, at_most: float = math.inf
) -> float:
    """Returns the value as a float; raises UserError unless it is finite and within bounds."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise UserError(f"{name} is {_shown(value)}; it must be a number")
    number = float(value)
    if not math.isfinite(number):
        raise UserError(f"{name} is {number}; it must be a finite number")
    if number <= above:
        raise UserError(f"{name} is {number}; it must be above {above:g}")
    if number > at_most:
        raise UserError(f"{name} is {number}; it must be at most {at_most:g}")
    return number


def true_or_false(name: str, value: object) -> bool:
    """Returns the value; raises UserError if it is not a bool."""
    if not isinstance(value, bool):
        raise UserError(f"{name} is {_shown(value)}; it must be True or False")
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
