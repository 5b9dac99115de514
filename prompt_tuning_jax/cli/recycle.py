"""``prompt-tuning recycle``."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from prompt_tuning_jax.cli.arguments import Command, non_negative, option, positional
from prompt_tuning_jax.cli.console import print_json, print_notes
from prompt_tuning_jax.errors import UserError, printable

_METHOD_OF = {"terms": "combination", "steps": "mlp", "seed": "mlp"}


@dataclass(frozen=True, kw_only=True)
class Recycle(Command):
    """Transfer a prompt to another model with the same vocabulary, without training."""

    name: ClassVar[str] = "recycle"
    example: ClassVar[str] = "recycle runs/quickstart --from tiny --to my_model --output recycled"

    prompt: str = positional("PROMPT")  # prompt, folder of prompts, or run
    source: str = option("MODEL", flag="--from")  # model that the prompt was trained on
    target: str = option("MODEL", flag="--to")  # model to use the prompt on
    output: str = option("FILE")  # new prompt; a folder where there are several
    # Map that is fitted from one model's token embeddings to the other's.
    by: Literal["linear", "mlp", "combination"] = "linear"
    # Fit on the N most common pieces of the vocabulary (default: all).
    pieces: int | None = option("N", default=None)
    # With --by combination: pieces per position (default: 64).
    terms: int | None = option("N", default=None)
    steps: int | None = option("N", default=None)  # with --by mlp: training steps (default: 200)
    # With --by mlp: seed of the training (default: 0).
    seed: int | None = option("N", default=None, parse=non_negative)
    json: bool = False  # print JSON
    allow_other_model: bool = False  # allow a prompt that was not trained on --from
    overwrite: bool = False  # replace an existing FILE

    def run(self) -> None:
        from prompt_tuning_jax.analysis.recycling import Fit, recycle

        options = self.given(*_METHOD_OF)
        for name in options:
            if self.by != _METHOD_OF[name]:
                raise UserError(f"--{name} has no effect without --by {_METHOD_OF[name]}")
        recycled = recycle(
            self.prompt,
            source=self.source,
            target=self.target,
            output=self.output,
            fit=Fit(by=self.by, **options),
            **self.given("pieces", "allow_other_model", "overwrite"),
        )
        if self.json:
            print_json(vars(recycled))
        else:
            print(
                f"{recycled.by}, fitted on the embeddings of {recycled.pieces:,} pieces: relative "
                f"error {recycled.error:.3f}, on held-out pieces {recycled.held_out_error:.3f}"
            )
            if recycled.prompt_error is not None:
                print(f"relative error of the combinations: {recycled.prompt_error:.3f}")
            for path in recycled.paths:
                print(printable(f"wrote {path}"))
        print_notes(recycled.notes)
