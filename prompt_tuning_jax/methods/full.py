"""Model tuning: every weight of the model trains.  The other end of the same switch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from prompt_tuning_jax.methods.base import Context, Method, TunedModel, TuningModule
from prompt_tuning_jax.models.t5.model import T5
from prompt_tuning_jax.typing import Array


@dataclass(frozen=True, kw_only=True)
class FullTuning(Method):
    """All parameters train (Lester et al. 2021, "model tuning").

    Pre-training is this from random weights.
    """

    identity_at_init: ClassVar[bool] = True
    mergeable: ClassVar[bool] = True
    default_optimizer: ClassVar[Mapping[str, Any]] = {
        "learning_rate": 0.001,
        "multiply_by_parameter_scale": True,
        "min_dim_size_to_factor": 128,
        "weight_decay": 0.0,
    }

    def attach(self, model: T5, *, key: Array, context: Context) -> TunedModel:
        return TunedModel(model, TuningModule())

    def trains(self, name: str) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class NoTuning(Method):
    """Nothing trains: the bare frozen model, to compare with."""

    identity_at_init: ClassVar[bool] = True

    def attach(self, model: T5, *, key: Array, context: Context) -> TunedModel:
        return TunedModel(model, TuningModule())

    def trains(self, name: str) -> bool:
        return False
