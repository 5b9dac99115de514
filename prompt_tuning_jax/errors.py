"""The one exception whose message a user is meant to read."""

_LONGEST = 2000  # characters


class UserError(Exception):
    """Wrong input from outside: one line that names the field, file, task or shape and what to do.

    The command line prints the message without a traceback and exits with status 2.  Of a message
    of thousands of characters, as values of damaged files make it, the middle is left out.
    """

    def __init__(self, message: str) -> None:
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 2 :]}"
        super().__init__(message)
