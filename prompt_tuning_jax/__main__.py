"""``python -m prompt_tuning_jax`` is ``prompt-tuning``, whose entry point this is."""

# Nothing is imported before Ctrl-C is taken care of: it may come while Python imports.
import os
import signal
import sys


def run() -> int:
    """Runs the command line and returns its exit status."""
    # A shell's job in the background ignores Ctrl-C, and so does this.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))
    from prompt_tuning_jax.cli.main import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
