"""The one exception whose message a user is meant to read."""


class UserError(Exception):
    """Wrong input from outside: one line that names the field, file, task or shape and what to do.

    The command line prints the message without a traceback and exits with status 2.
    """
