"""``prompt-tuning inspect``."""

from dataclasses import dataclass
from typing import ClassVar

from prompt_tuning_jax.cli.arguments import Command, positional
from prompt_tuning_jax.cli.console import print_json, print_rows
from prompt_tuning_jax.errors import printable


@dataclass(frozen=True, kw_only=True)
class Inspect(Command):
    """Describe a model folder, a prompt file, an adapter or a run."""

    name: ClassVar[str] = "inspect"
    example: ClassVar[str] = "inspect runs/quickstart"

    path: str = positional("PATH")  # file, folder, gs:// address, or name of a model
    json: bool = False  # print JSON
    fingerprint: bool = False  # also compute the fingerprint of a large or remote model

    def run(self) -> None:
        from prompt_tuning_jax.inference.inspection import describe, inspect

        options = {"with_fingerprint": True} if self.fingerprint else {}
        if self.json:
            print_json(describe(self.path, **options))
            return
        rows = inspect(self.path, **options)
        print_rows((printable(name), printable(str(value))) for name, value in rows)
