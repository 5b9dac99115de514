"""``prompt-tuning completion``."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from prompt_tuning_jax.cli.arguments import Command, positional


@dataclass(frozen=True, kw_only=True)
class Completion(Command):
    """Print the script that makes a shell complete commands and options."""

    name: ClassVar[str] = "completion"
    example: ClassVar[str] = "completion bash >> ~/.bashrc"

    shell: Literal["bash", "zsh", "fish"] = positional("SHELL")  # bash, zsh or fish

    def run(self) -> None:
        from argcomplete.shell_integration import shellcode

        print(shellcode(["prompt-tuning"], shell=self.shell))
