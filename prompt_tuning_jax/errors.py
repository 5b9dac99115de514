"""``UserError``, the exception whose message is written for users, and helpers for such messages.

Suggestions for misspelled names, text from files made safe to print on a terminal, and one-line
errors for wrong calls of the public functions.
"""

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

_LONGEST = 2000  # characters


class UserError(Exception):
    """Invalid input: one line that names the field, file, task or shape, and says what to do.

    The command line prints the message without a traceback and exits with status 2.  Messages quote
    values of damaged files: the middle of a very long message is left out, and terminal control
    characters are escaped.  ``details`` follow, one per line, for instance one for each of several
    tasks.
    """

    def __init__(self, message: str, *details: str) -> None:
        super().__init__("\n  ".join(map(_one_line, (message, *details))))


def _one_line(text: str) -> str:
    text = printable(text)
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"


_MAX_LISTED = 12


def suggest(name: str, known: Iterable[str], *, most: int = _MAX_LISTED) -> str:
    """Suggests the known name that was probably meant, and lists at most ``most`` of them.

    >>> suggest("acuracy", ["accuracy", "f1_macro"])
    "did you mean 'accuracy'? There are: accuracy, f1_macro"
    """
    names = list(known)
    if not names:
        return "there are none"
    listed = ", ".join(names[:most])
    if len(names) > most:
        listed += f" and {len(names) - most} more"
    near = nearest(name, names)
    return f"there are: {listed}" if near is None else f"did you mean {near!r}? There are: {listed}"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Returns the known name that was probably meant; None if no name is similar."""
    return next(iter(difflib.get_close_matches(name, [*known], n=1, cutoff=0.6)), None)


# Control characters except the tab, line separators, characters that change the direction of text,
# and lone surrogates, which cannot be printed at all.
_CONTROL = re.compile(
    "[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_SHORT = {"\n": "\\n", "\r": "\\r"}


def printable(text: str) -> str:
    r"""Returns the text in one line, with terminal control characters escaped: ``\x1b``."""
    return _CONTROL.sub(lambda match: _SHORT.get(match[0]) or _escaped(match[0]), text)


def printable_lines(text: str) -> str:
    """Returns ``printable`` of each line of the text."""
    return "\n".join(map(printable, text.split("\n")))


def printable_json(text: str) -> str:
    r"""Returns equivalent JSON, with terminal control characters escaped: ``\u001b``."""
    return _CONTROL.sub(
        lambda match: match[0] if match[0] == "\n" else f"\\u{ord(match[0]):04x}", text
    )


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


F = TypeVar("F", bound=Callable[..., Any])


def with_named_arguments(function: F) -> F:
    """Returns the function, raising UserError where a wrong call would raise a bare TypeError."""
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
            f"{called} takes {', '.join(by_position)} by position and got {len(args)} values"
            f"{f'; name the others: {others}' if others else ''}"
        )
    return f"{called}: {error}; it takes {', '.join(names)}"
