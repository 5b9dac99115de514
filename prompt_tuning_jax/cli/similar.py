"""``prompt-tuning similar``."""

import sys
from dataclasses import dataclass
from typing import ClassVar, Literal

from prompt_tuning_jax.cli.arguments import Command, option, positional
from prompt_tuning_jax.cli.console import print_json
from prompt_tuning_jax.errors import printable


@dataclass(frozen=True, kw_only=True)
class Similar(Command):
    """List prompts by their similarity to one, which measures that of their tasks (SPoT)."""

    name: ClassVar[str] = "similar"
    example: ClassVar[str] = (
        "similar new.safetensors --among runs/a runs/b --top 3 --output init.safetensors"
    )

    source: str = positional("PROMPT")  # prompt file or adapter
    among: list[str] = option("PROMPTS", nargs="+")  # prompt files, folders of them, runs
    # Similarity: cosine of the mean positions, or mean cosine of all pairs of positions.
    by: Literal["mean", "tokens"] = "mean"
    top: int | None = option("K", default=None)  # only the K most similar
    json: bool = False  # print JSON
    # Write the most similar prompt, or the mixture of --top, to initialize a training with.
    output: str | None = option("FILE", default=None)
    overwrite: bool = False  # replace an existing FILE

    def run(self) -> None:
        from prompt_tuning_jax.analysis.similarity import similar

        options = self.given("top", "output", "overwrite")
        prompts = similar(self.source, self.among, by=self.by, **options)
        if self.json:
            print_json([vars(prompt) for prompt in prompts])
        else:
            for prompt in prompts:
                task = f"  {prompt.task}" if prompt.task else ""
                print(printable(f"{prompt.similarity:7.4f}  {prompt.path}{task}"))
        if self.output:
            mixed = self.top is not None and self.top > 1
            what = f"a mixture of the {len(prompts)} most similar" if mixed else "the most similar"
            print(
                f"wrote {what} to {self.output}; train from it with --set method.init=file --set "
                f"method.init_path={self.output}",
                file=sys.stderr,
            )
