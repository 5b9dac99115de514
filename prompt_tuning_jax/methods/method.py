"""The contract of a tuning method: how it attaches to a frozen T5, and what it trains."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax.data.vocab import Vocabulary
from prompt_tuning_jax.decoding.rank import rank
from prompt_tuning_jax.losses import TokenSums, token_sums
from prompt_tuning_jax.models.blocks import Remat
from prompt_tuning_jax.models.slots import NO_SLOTS, Slots
from prompt_tuning_jax.models.t5 import T5, Encoded
from prompt_tuning_jax.typing import Array, HostArray, Mask


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a method may depend on besides the model: the data's labels and tasks, the words."""

    labels: tuple[str, ...] = ()
    vocabulary: Vocabulary | None = None
    tasks: int = 1  # how many


class MethodModule(nnx.Module):
    """What a method adds to a model: parameters, and the slots that they fill.

    Fills none unless overridden.
    """

    def slots(
        self,
        model: T5,
        tokens_BT: Array | HostArray,
        *,
        task_B: Array | HostArray | None = None,
        key: Array | None = None,
    ) -> Slots:
        """The slots for one batch of encoder tokens.

        ``task_B`` int32 is the number of each row's task in the mixture, where the data has
        several; with a ``key``, dropout is on.
        """
        return NO_SLOTS

    def with_dropout(self, model: T5, *, key: Array) -> T5:
        """The model to run where dropout is on: modules that a method has put into it get keys.

        ``model`` itself stays as it is: a copy that holds this call's keys cannot outlive it.
        """
        return model


class Attached(nnx.Module):
    """A model with a method attached; its parameters are ``model/...`` and ``method/...``."""

    def __init__(self, model: T5, method: MethodModule):
        self.model = model
        self.method = method

    def slots(
        self,
        tokens_BT: Array | HostArray,
        *,
        task_B: Array | HostArray | None = None,
        key: Array | None = None,
    ) -> Slots:
        return self.method.slots(self.model, tokens_BT, task_B=task_B, key=key)

    def __call__(
        self,
        encoder_input_tokens: Array | HostArray,
        decoder_input_tokens: Array | HostArray,
        *,
        task_B: Array | HostArray | None = None,
        key: Array | None = None,
        remat: Remat = "none",
    ) -> Array:
        """Logits ``[B, S, V]`` in float32; with a ``key``, dropout is on."""
        slots = self.slots(encoder_input_tokens, task_B=task_B, key=key)
        model = self.model if key is None else self.method.with_dropout(self.model, key=key)
        return model(encoder_input_tokens, decoder_input_tokens, slots=slots, key=key, remat=remat)

    def token_sums(
        self,
        encoder_input_tokens: Array | HostArray,
        decoder_input_tokens: Array | HostArray,
        targets_BS: Array | HostArray,
        *,
        task_B: Array | HostArray | None = None,
        key: Array | None = None,
        remat: Remat = "none",
        z_loss: float = 0.0,
    ) -> TokenSums:
        """What training makes smaller: the cross entropy of the targets' tokens."""
        logits_BSV = self(
            encoder_input_tokens, decoder_input_tokens, task_B=task_B, key=key, remat=remat
        )
        return token_sums(logits_BSV, targets_BS, z_loss=z_loss)

    def label_scores(
        self,
        tokens_BT: Array,
        labels_CS: Array,
        *,
        task_B: Array | HostArray | None = None,
        max_logits: int = 2**26,
    ) -> Array:
        """``[B, C]``: the log-probability of each label, for ranking; see ``decoding.rank``.

        The encoder and the cross-attention keys are computed once per example.
        """
        encoded, slots = self.encode(tokens_BT, task_B=task_B)
        rest = replace(slots, encoder_input=None)

        def decode_logits(decoder_input_S: Array) -> Array:
            tokens_BS = jnp.broadcast_to(decoder_input_S, (len(tokens_BT), *decoder_input_S.shape))
            return self.model.decode(tokens_BS, encoded, slots=rest)

        return rank(decode_logits, labels_CS, max_logits=max_logits)

    def encode(
        self, tokens_BT: Array | HostArray, *, task_B: Array | HostArray | None = None
    ) -> tuple[Encoded, Slots]:
        """The encoder's output, and the slots that the decoder still needs."""
        slots = self.slots(tokens_BT, task_B=task_B)
        return self.model.encode(tokens_BT, slots=slots), slots


class Method(Protocol):
    """A frozen dataclass of hyper-parameters that knows how to attach itself.

    Its docstring says how many parameters it trains.  ``unchanged_at_start`` promises that the
    model computes with fresh parameters what it computes without.
    """

    unchanged_at_start: ClassVar[bool] = False

    def attach(self, model: T5, *, key: Array, context: Context) -> Attached:
        """The model with fresh parameters of this method; ``key`` decides their initial value.

        ``model`` itself stays as it is: a method that fills its modules' slots takes a
        ``with_free_slots`` of it.
        """
        ...

    def trains(self, name: str) -> bool:
        """Whether the parameter of an ``Attached`` with this path trains."""
        return name.startswith("method/") or "/around/" in name

    def added_length(self) -> int:
        """How many positions it adds to the encoder's input."""
        return 0

    def draws(self) -> bool:
        """Whether training draws random numbers for it (dropout of its own)."""
        return False

    def complaints(self) -> Iterator[str]:
        """A line for each field that makes no sense, the field as ``method.NAME``."""
        yield from ()

    def folded(self, attached: Attached) -> "tuple[Method, Attached]":
        """The same function without what only training needs, and the method that it then is.

        This is what is kept of a run.  The method that comes out attaches itself with no more of
        a ``Context`` than the labels.
        """
        return self, attached


def with_free_slots(model: T5) -> T5:
    """A copy of the structure around the same arrays, whose modules may be changed."""
    copy: T5 = nnx.merge(*nnx.split(model))
    return copy


def mask_of(method: Method, names: list[str]) -> Mask:
    """The mask, the only truth about what trains: path -> trainable."""
    return {name: method.trains(name) for name in names}
