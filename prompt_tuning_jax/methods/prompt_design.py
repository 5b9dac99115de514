"""Prompt design: words of an instruction and of demonstrations in the input (Brown et al. 2020)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from prompt_tuning_jax.data.tasks.text_template import parse_template
from prompt_tuning_jax.methods.base import Context, Method, TunedModel, TuningModule
from prompt_tuning_jax.models.t5.model import T5
from prompt_tuning_jax.typing import Array


@dataclass(frozen=True, kw_only=True)
class PromptDesign(Method):
    """0 parameters: the frozen model reads an instruction and ``shots`` examples with answers.

    The examples are drawn from the training split by each of ``training.seeds``, which are members
    in evaluation; with ``balance=balanced`` every label comes as often as the others (of tasks
    without labels as drawn).  Of those that make an input longer than ``data.inputs_length`` the
    last drawn are left out, input by input (``data/demonstrations.py``).

    ``instruction``, ``demonstration`` (of ``{inputs}`` and ``{targets}``) for each example, and
    ``query`` (of ``{inputs}``) are joined by ``separator``.  SentencePiece reads line breaks as
    spaces.  Labels are ranked or text is written as ``evaluation.strategy`` says.
    """

    identity_at_init: ClassVar[bool] = True

    instruction: str = ""
    shots: int = 8
    balance: Literal["balanced", "as_drawn"] = "balanced"
    demonstration: str = "{inputs}\n{targets}"
    query: str = "{inputs}"
    separator: str = "\n\n"

    def attach(self, model: T5, *, key: Array, context: Context) -> TunedModel:
        return TunedModel(model, TuningModule())

    def trains(self, name: str) -> bool:
        return False

    def compose(self, demonstrations: Sequence[Mapping[str, str]], inputs: str) -> str:
        """The text that the model reads for ``inputs``."""
        one = parse_template(self.demonstration, field="method.demonstration")
        query = parse_template(self.query, field="method.query")
        parts = [self.instruction] if self.instruction else []
        parts += [one.render(each) for each in demonstrations]
        return self.separator.join([*parts, query.render({"inputs": inputs})])

    def config_errors(self) -> Iterator[str]:
        if self.shots < 0:
            yield f"method.shots is {self.shots}; must be at least 0"
        for name, wanted in (("demonstration", ["inputs", "targets"]), ("query", ["inputs"])):
            columns = parse_template(getattr(self, name), field=f"method.{name}").columns
            if sorted(columns) != wanted:
                shown = " and ".join(f"{{{column}}}" for column in wanted)
                yield f"method.{name} is {getattr(self, name)!r}; it must name {shown}, once each"
