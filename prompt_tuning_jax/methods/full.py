"""Model tuning: every weight of the model trains.  The other end of the same switch."""

from dataclasses import dataclass

from prompt_tuning_jax.methods.method import Attached, Context, MethodModule
from prompt_tuning_jax.models.slots import NO_SLOTS, Slots
from prompt_tuning_jax.models.t5 import T5
from prompt_tuning_jax.typing import Array, HostArray


class Nothing(MethodModule):
    """Adds no parameter and fills no slot."""

    def slots(self, model: T5, tokens_BT: Array | HostArray) -> Slots:
        return NO_SLOTS


@dataclass(frozen=True, kw_only=True)
class FullTuning:
    """All parameters train (Lester et al. 2021, "model tuning").

    Pre-training is this from random weights.
    """

    def attach(self, model: T5, *, key: Array, context: Context) -> Attached:
        return Attached(model, Nothing())

    def trains(self, name: str) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class NoTuning:
    """Nothing trains: the bare frozen model, to compare with."""

    def attach(self, model: T5, *, key: Array, context: Context) -> Attached:
        return Attached(model, Nothing())

    def trains(self, name: str) -> bool:
        return False
