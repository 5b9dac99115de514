"""The contract of a tuning method: how it attaches to a frozen T5, and what it trains."""

from dataclasses import dataclass
from typing import Protocol

from flax import nnx

from prompt_tuning_jax.data.vocab import Vocabulary
from prompt_tuning_jax.models.blocks import Remat
from prompt_tuning_jax.models.slots import Slots
from prompt_tuning_jax.models.t5 import T5, Encoded
from prompt_tuning_jax.typing import Array, HostArray, Mask


@dataclass(frozen=True, kw_only=True)
class Context:
    """What an initial value may depend on besides the model: the task's labels, the vocabulary."""

    labels: tuple[str, ...] = ()
    vocabulary: Vocabulary | None = None


class MethodModule(nnx.Module):
    """What a method adds to a model: parameters, and the slots that they fill."""

    def slots(self, model: T5, tokens_BT: Array | HostArray) -> Slots:
        """The slots for one batch of encoder tokens."""
        raise NotImplementedError


class Attached(nnx.Module):
    """A model with a method attached; its parameters are ``model/...`` and ``method/...``."""

    def __init__(self, model: T5, method: MethodModule):
        self.model = model
        self.method = method

    def slots(self, tokens_BT: Array | HostArray) -> Slots:
        return self.method.slots(self.model, tokens_BT)

    def __call__(
        self,
        encoder_input_tokens: Array | HostArray,
        decoder_input_tokens: Array | HostArray,
        *,
        key: Array | None = None,
        remat: Remat = "none",
    ) -> Array:
        """Logits ``[B, S, V]`` in float32; with a ``key``, dropout is on."""
        slots = self.slots(encoder_input_tokens)
        return self.model(
            encoder_input_tokens, decoder_input_tokens, slots=slots, key=key, remat=remat
        )

    def encode(self, tokens_BT: Array | HostArray) -> tuple[Encoded, Slots]:
        """The encoder's output, and the slots that the decoder still needs."""
        slots = self.slots(tokens_BT)
        return self.model.encode(tokens_BT, slots=slots), slots


class Method(Protocol):
    """A frozen dataclass of hyper-parameters that knows how to attach itself."""

    def attach(self, model: T5, *, key: Array, context: Context) -> Attached:
        """The model with fresh parameters of this method; ``key`` decides their initial value."""
        ...

    def trains(self, name: str) -> bool:
        """Whether the parameter of an ``Attached`` with this path trains."""
        ...


def mask_of(method: Method, names: list[str]) -> Mask:
    """The mask, the only truth about what trains: path -> trainable."""
    return {name: method.trains(name) for name in names}
