"""The one exception whose message a user is meant to read."""

from prompt_tuning_jax.printable import printable

_LONGEST = 2000  # characters


class UserError(Exception):
    """Wrong input from outside: one line that names the field, file, task or shape and what to do.

    The command line prints the message without a traceback and exits with status 2.  Values of
    damaged files are in messages: of thousands of characters the middle is left out, and those that
    a terminal obeys are escaped.  ``details`` follow, one per line: what is wrong with each of
    several tasks.
    """

    def __init__(self, message: str, *details: str) -> None:
        super().__init__("\n  ".join(map(_one_line, (message, *details))))


def _one_line(text: str) -> str:
    text = printable(text)
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
