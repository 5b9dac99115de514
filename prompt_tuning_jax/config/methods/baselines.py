"""Configs of the baselines that train nothing."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from prompt_tuning_jax.config.methods.base import MethodConfig, template_errors
from prompt_tuning_jax.config.text_template import parse_template


@dataclass(frozen=True, kw_only=True)
class NoTuning(MethodConfig):
    """0 parameters: the frozen model alone, as a baseline."""

    for_images = True
    is_trainable = False
    identity_at_init = True

    def trains(self, name: str) -> bool:
        return False


@dataclass(frozen=True, kw_only=True)
class PromptDesign(MethodConfig):
    """0 parameters: the frozen model reads an instruction and ``shots`` examples with answers.

    Each of ``training.seeds`` draws different examples from the training split; evaluation treats
    the seeds as members of an ensemble.  If an input is longer than ``data.inputs_length``, the
    examples drawn last are left out.  SentencePiece reads line breaks as spaces.
    ``evaluation.strategy`` decides whether labels are ranked or text is generated.
    """

    is_trainable = False
    composes_inputs = True
    identity_at_init = True
    lower_bounds: ClassVar[Mapping[str, float]] = {"shots": 0}

    instruction: str = ""  # text at the start of every input
    shots: int = 8  # number of examples in front of the input
    # Whether every label occurs equally often among the examples; without effect for tasks without
    # labels.
    balance: Literal["balanced", "as_drawn"] = "balanced"
    demonstration: str = "{inputs}\n{targets}"  # template of an example
    query: str = "{inputs}"  # template of the input
    separator: str = "\n\n"  # text between instruction, examples and input

    def trains(self, name: str) -> bool:
        return False

    def num_demonstrations(self) -> int:
        return self.shots

    def balances_labels(self) -> bool:
        return self.balance == "balanced"

    def compose(self, demonstrations: Sequence[Mapping[str, str]], inputs: str) -> str:
        demonstration = parse_template(self.demonstration, field="method.demonstration")
        query = parse_template(self.query, field="method.query")
        parts = [self.instruction] if self.instruction else []
        parts += [demonstration.render(example) for example in demonstrations]
        return self.separator.join([*parts, query.render({"inputs": inputs})])

    def config_errors(self) -> Iterator[str]:
        yield from super().config_errors()
        yield from template_errors(self, demonstration=["inputs", "targets"], query=["inputs"])
