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
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}? There are: {listed}" if near else f"there are: {listed}"
