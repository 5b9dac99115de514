"""The end of an error message about an unknown name: the nearest name, and what there is."""

import difflib
from collections.abc import Iterable

_MAX_LISTED = 12


def suggest(name: str, known: Iterable[str], *, most: int = _MAX_LISTED) -> str:
    """Say which of the known names was probably meant, and list them, ``most`` at most.

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
    """The known name that was probably meant; None where none is like it."""
    return next(iter(difflib.get_close_matches(name, [*known], n=1, cutoff=0.6)), None)
