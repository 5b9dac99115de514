"""Parameters of the model itself, chosen by regular expressions (BitFit, Ben Zaken et al. 2022)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods.base import Context, Method, TunedModel, TuningModule
from prompt_tuning_jax.methods.linear_adapter import complaints_of
from prompt_tuning_jax.models.t5.model import T5
from prompt_tuning_jax.typing import Array
from prompt_tuning_jax.untrusted_input import compile_pattern, shown

_MODEL = "model/"


@dataclass(frozen=True, kw_only=True)
class PatternTuning(Method):
    """The sizes of the chosen parameters; by default those of the norms and position biases.

    That is ``D * (2 * encoder layers + 3 * decoder layers + 2)`` scales and ``2 * H * buckets``
    biases (of models with biases per layer ``H * buckets * (encoder layers + decoder layers)``).
    BitFit trains biases; a T5 has none, these are what is left that is no matrix.

    ``patterns`` are RE2 expressions on whole paths (``encoder/layers_0/mlp/wo/kernel``).
    """

    identity_at_init: ClassVar[bool] = True
    mergeable: ClassVar[bool] = True
    default_optimizer: ClassVar[Mapping[str, Any]] = {"learning_rate": 0.1, "weight_decay": 0.0}

    patterns: tuple[str, ...] = (".*/scale", ".*/rel_embedding")

    def attach(self, model: T5, *, key: Array, context: Context) -> TunedModel:
        params = param_tree.split(model)[1]
        for pattern in self.patterns:
            if not any(param_tree.matching(params, pattern, of="method.patterns").values()):
                raise UserError(
                    f"method.patterns: {shown(pattern)} is the path of no parameter; paths are "
                    f"whole, for instance {next(iter(params))}"
                )
        return TunedModel(model, TuningModule())

    def trains(self, name: str) -> bool:
        path = name.removeprefix(_MODEL)
        patterns = (compile_pattern(pattern, of="method.patterns") for pattern in self.patterns)
        return path != name and any(pattern.fullmatch(path) for pattern in patterns)

    def config_errors(self) -> Iterator[str]:
        if not self.patterns:
            yield "method.patterns is empty; give at least one regular expression"
        yield from complaints_of(self.patterns, field="method.patterns")
