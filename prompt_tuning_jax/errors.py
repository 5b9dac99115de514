"""The one exception whose message a user is meant to read."""

from prompt_tuning_jax.printable import printable

_LONGEST = 2000  # characters


class UserError(Exception):
    """Wrong input from outside: one line that names the field, file, task or shape and what to do.

    The command line prints the message without a traceback and exits with status 2.  Values of
    damaged files are in messages: of thousands of characters the middle is left out, and those that
    a terminal obeys are escaped.
    """

    def __init__(self, message: str) -> None:
        message = printable(message)
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 2 :]}"
        super().__init__(message)
