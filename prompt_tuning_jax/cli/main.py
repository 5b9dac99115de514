"""``prompt-tuning COMMAND``: parse the arguments and run the command.

A command imports slow libraries in its ``run``, so that ``--help`` is fast.
"""

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import fields
from typing import Any, NoReturn

from prompt_tuning_jax.cli.ablate import Ablate
from prompt_tuning_jax.cli.analyze import Analyze
from prompt_tuning_jax.cli.arguments import Command, Parser, add_command
from prompt_tuning_jax.cli.completion import Completion
from prompt_tuning_jax.cli.console import notes_on_stderr
from prompt_tuning_jax.cli.convert import Convert, Merge
from prompt_tuning_jax.cli.evaluate import Eval
from prompt_tuning_jax.cli.experiment import DeviceOptions, StudyOptions
from prompt_tuning_jax.cli.import_gin import ImportGin
from prompt_tuning_jax.cli.init import Init
from prompt_tuning_jax.cli.inspect import Inspect
from prompt_tuning_jax.cli.interruption import interruptible
from prompt_tuning_jax.cli.metrics import Metrics
from prompt_tuning_jax.cli.plan import Plan
from prompt_tuning_jax.cli.predict import Predict
from prompt_tuning_jax.cli.recycle import Recycle
from prompt_tuning_jax.cli.serve import Serve
from prompt_tuning_jax.cli.similar import Similar
from prompt_tuning_jax.cli.suite import Suite, Transfer
from prompt_tuning_jax.cli.tasks import Tasks
from prompt_tuning_jax.cli.train import Train
from prompt_tuning_jax.distributed.processes import leave_out_missing_tpu
from prompt_tuning_jax.errors import UserError, printable_lines, suggest

COMMANDS: tuple[type[Command], ...] = (
    *(Train, Eval, Predict, Plan, Init, ImportGin, Tasks, Metrics, Inspect),
    *(Convert, Merge, Analyze, Similar, Recycle, Suite, Transfer, Ablate, Serve),
    Completion,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 2 for wrong input, 130 when interrupted."""
    with notes_on_stderr(), interruptible(sys._getframe()) as interruption:
        try:
            return _main(sys.argv[1:] if argv is None else argv)
        except BaseException as error:
            # An interrupted import may raise another error, and so may what comes after an import
            # that Ctrl-C does not interrupt.
            if interruption.came or isinstance(error, KeyboardInterrupt):
                interruption.heeded()
                return 130
            if not isinstance(error, UserError):
                raise
            print(printable_lines(f"error: {error}"), file=sys.stderr)
            return 2


def _main(argv: Sequence[str]) -> int:
    if "_ARGCOMPLETE" in os.environ:  # the shell asks for completions; this does not return
        import argcomplete

        argcomplete.autocomplete(build_parser())
    leave_out_missing_tpu()
    try:
        if not argv:
            build_parser().print_help()
            return 0
        command = parse(argv)
        with _processes(command):
            command.run()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, for example head, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the whole command line."""
    parser = Parser(
        prog="prompt-tuning",
        description="Prompt tuning and related methods for frozen models in JAX.",
        epilog="Run prompt-tuning COMMAND --help for the options of a command.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version",
        action=_Version,
        nargs=0,
        help="show the versions of the package and of its libraries, and exit",
    )
    commands = parser.add_subparsers(
        title="commands", dest="command", metavar="COMMAND", required=True
    )
    for command in COMMANDS:
        add_command(commands, command)
    return parser


def parse(argv: Sequence[str]) -> Command:
    """Returns the command with its arguments; UserError for wrong ones."""
    args, unknown = build_parser().parse_known_args(_rewrite_gin_flags(argv))
    if unknown:
        name = unknown[0].partition("=")[0]
        options = [option for option in args.options if option.startswith("--")]
        near = suggest(name, options) if name.startswith("-") else "quote a text that has spaces"
        raise UserError(f"unknown argument {name!r}: {near}")
    command: type[Command] = args.command_class
    return command(**{field.name: getattr(args, field.name) for field in fields(command)})


def _rewrite_gin_flags(argv: Sequence[str]) -> list[str]:
    """Returns ``--gin.NAME=VALUE``, as T5X spells it, as ``--gin_bindings=NAME=VALUE``."""
    for arg in argv:
        if arg.startswith("--gin.") and "=" not in arg:
            raise UserError(f"{arg}: expected --gin.NAME=VALUE, without spaces")
    return [
        f"--gin_bindings={arg.removeprefix('--gin.')}" if arg.startswith("--gin.") else arg
        for arg in argv
    ]


def _processes(command: Command) -> AbstractContextManager[None]:
    """Within the context, this is one of several processes where options or a cluster say so."""
    if not isinstance(command, DeviceOptions | StudyOptions):
        return nullcontext()
    from prompt_tuning_jax.distributed.processes import Processes, several_are_meant, started

    if not isinstance(command, DeviceOptions):
        if several_are_meant(Processes()):
            raise UserError(f"{command.name} runs in one process; start it once, on one host")
        return nullcontext()
    return started(
        Processes(
            coordinator_address=command.coordinator_address,
            count=command.process_count,
            index=command.process_index,
            silence_seconds=float(command.process_timeout),
        )
    )


class _Version(argparse.Action):
    """Print the versions of the package, of Python and of JAX's libraries."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from importlib.metadata import PackageNotFoundError, version

        from prompt_tuning_jax import __version__

        others = [f"Python {platform.python_version()}"]
        for name in ("jax", "jaxlib", "flax", "optax"):
            with suppress(PackageNotFoundError):
                others.append(f"{name} {version(name)}")
        print(f"{parser.prog} {__version__} ({', '.join(others)})")
        parser.exit()
