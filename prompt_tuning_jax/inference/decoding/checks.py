"""Checks of what a caller asks for: one line that names the argument and its value."""

import math
import numbers

from prompt_tuning_jax.errors import UserError

_MOST = 2**31 - 1  # what an int32 on a device holds


def whole_number(name: str, value: object, *, at_least: int, at_most: int = _MOST) -> int:
    """The value as an int; UserError where it is another kind of number or out of bounds."""
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
    """The value as a float; UserError where it is no finite number within the bounds."""
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
    """The value as a bool; UserError where it is none."""
    if not isinstance(value, bool):
        raise UserError(f"{name} is {_shown(value)}; it must be True or False")
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
