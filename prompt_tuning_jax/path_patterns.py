"""Regular expressions on paths, matched in time that grows with the path alone.

Patterns come in files, too, and Python's own ``re`` can take for ever on a short one.
"""

import functools
from typing import Any

import re2

from prompt_tuning_jax.errors import UserError

_MAX_BYTES = 1 << 23  # of a compiled pattern


def compile_pattern(pattern: str, *, of: str) -> Any:
    """The expression in RE2's syntax, which is ``re``'s without lookaround and backreferences.

    Its ``fullmatch`` says whether a whole path matches.  Raises UserError that begins with ``of``
    (a field) for what is no such expression, or is too large.
    """
    try:
        return _compiled(pattern)
    except (re2.error, UnicodeEncodeError) as error:
        why = str(error)
        if error.args and isinstance(error.args[0], bytes):
            why = error.args[0].decode(errors="replace")
        raise UserError(
            f"{of} has {shown(pattern)}, which is no regular expression (RE2's syntax): {why[:80]}"
        ) from None


def shown(pattern: str) -> str:
    """A pattern for a message."""
    return repr(pattern) if len(pattern) <= 80 else f"{pattern[:77]!r}..."


@functools.lru_cache(maxsize=1024)
def _compiled(pattern: str) -> Any:
    options = re2.Options()
    options.log_errors = False
    options.max_mem = _MAX_BYTES
    return re2.compile(pattern, options=options)
