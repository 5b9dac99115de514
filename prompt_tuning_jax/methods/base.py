"""The contract of a tuning method: a module attached to a frozen model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar

import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.config.methods import MethodConfig, is_attached
from prompt_tuning_jax.data.vocabularies.vocab import Vocabulary
from prompt_tuning_jax.models.injections import NO_INJECTIONS, Injections
from prompt_tuning_jax.models.layers import split_key
from prompt_tuning_jax.models.losses import TokenSums, class_sums, token_sums
from prompt_tuning_jax.models.t5.blocks import Remat
from prompt_tuning_jax.models.t5.model import T5, Encoded
from prompt_tuning_jax.typing import Array, HostArray, Mask

C = TypeVar("C", bound=MethodConfig)
PROMPT = "method/prompt_PD"  # the path of a plain prompt, as prompt tuning trains it
# The tokens of each label, the end of sequence included.
LabelTokens: TypeAlias = tuple[tuple[int, ...], ...]
# The log-probability of a label that the method does not know; finite, so that means are.
UNKNOWN_LABEL_LOG_PROB = -1e10


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a method may depend on besides its config and the model."""

    labels: tuple[str, ...] = ()
    vocabulary: Vocabulary | None = None
    num_tasks: int = 1
    # The arrays that init=file and init=source start from, by path.
    init_arrays: Mapping[str, HostArray] = field(default_factory=dict)


class TuningModule(nnx.Module, Generic[C]):
    """What a method adds to a model: its parameters, and the injections computed from them.

    This is the method of configs without parameters of their own: it attaches to a model by
    changing nothing, and injects nothing.
    """

    def __init__(self, config: C):
        self.config = config

    @classmethod
    def attach(cls, config: C, model: T5, *, key: Array, context: Context) -> "TunedModel":
        """The model with new parameters, which ``key`` initializes.

        ``model`` is left as it is: a method that puts adapters into it takes a ``shallow_copy``.
        """
        return TunedModel(model, cls(config))

    def for_inference(self, model: T5) -> "TunedModel":
        """The model with the method in the form in which a run saves it.

        Its config (``method.config``) attaches to a model with no more of a ``Context`` than the
        labels.
        """
        return TunedModel(model, self)

    def injections(
        self,
        model: T5,
        tokens_BT: Array | HostArray,
        *,
        task_B: Array | HostArray | None = None,
        key: Array | None = None,
    ) -> Injections:
        """The injections for one batch of encoder tokens.

        ``task_B`` int32 is the number of each row's task if the data is a mixture of several; with
        a ``key``, dropout is on.
        """
        return NO_INJECTIONS

    @property
    def label_tokens(self) -> LabelTokens:
        """The tokens of the labels that the method scores itself; empty if it does not."""
        return ()

    def label_logits(self, hidden_BD: Array) -> Array:
        """``[B, C]`` for ``label_tokens``, from the output head's input at the first position."""
        raise NotImplementedError

    def with_dropout(self, model: T5, *, key: Array) -> T5:
        """The model with dropout on in the modules that the method has put into it.

        ``model`` is left as it is, and the copy with this call's keys is not kept.
        """
        return model


class Known:
    """What is known about something that was attached, the metadata of its file; None: nothing.

    Equal to every other, so that what differs in it alone shares its programs.
    """

    def __init__(self, about: Any = None) -> None:
        self.about = about

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Known)

    def __hash__(self) -> int:
        return hash(Known)


class TunedModel(nnx.Module):
    """A model with a method attached; its parameters are ``model/...`` and ``method/...``."""

    def __init__(self, model: T5, method: TuningModule[Any]):
        self.model = model
        self.method = method
        self.known = Known()

    def __repr__(self) -> str:
        """The model's, and what is attached to it: arrays with their shapes."""
        params = param_tree.split(self)[1]
        own = {name: array for name, array in params.items() if is_attached(name)}
        shown = [f"{name} {list(array.shape)}" for name, array in [*own.items()][:3]]
        shown += [f"{len(own) - 3} more"] * (len(own) > 3)
        return (
            f"{self.model!r} with {type(self.method).__name__}: "
            f"{sum(array.size for array in own.values()):,} parameters ({', '.join(shown)})"
        )

    def for_inference(self) -> "TunedModel":
        """The same function of the inputs, without what only training needs: what a run saves."""
        return self.method.for_inference(self.model)

    def injections(
        self,
        tokens_BT: Array | HostArray,
        *,
        task_B: Array | HostArray | None = None,
        key: Array | None = None,
    ) -> Injections:
        return self.method.injections(self.model, tokens_BT, task_B=task_B, key=key)

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
        injections = self.injections(encoder_input_tokens, task_B=task_B, key=key)
        model = self.model if key is None else self.method.with_dropout(self.model, key=key)
        return model(
            encoder_input_tokens, decoder_input_tokens, injections=injections, key=key, remat=remat
        )

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
        weights_B: Array | HostArray | None = None,
    ) -> TokenSums:
        """The loss: the summed cross entropy of the targets' tokens.

        If the method scores labels itself, that of the targets as a choice among its labels.
        """
        labels = self.method.label_tokens
        if labels:
            logits_BC = self.label_logits(encoder_input_tokens, task_B=task_B, key=key, remat=remat)
            same_BC = same_tokens(targets_BS, labels, padding=self.model.token_ids.fill)
            class_B = jnp.where(same_BC.any(axis=1), jnp.argmax(same_BC, axis=1), -1)
            return class_sums(logits_BC, class_B, z_loss=z_loss, weights_B=weights_B)
        logits_BSV = self(
            encoder_input_tokens, decoder_input_tokens, task_B=task_B, key=key, remat=remat
        )
        fill = self.model.token_ids.fill
        return token_sums(logits_BSV, targets_BS, z_loss=z_loss, padding=fill, weights_B=weights_B)

    def label_logits(
        self,
        tokens_BT: Array | HostArray,
        *,
        task_B: Array | HostArray | None = None,
        key: Array | None = None,
        remat: Remat = "none",
    ) -> Array:
        """``[B, C]``: the method's scores of its ``label_tokens``."""
        injections = self.injections(tokens_BT, task_B=task_B, key=key)
        keys = split_key(key, 2)
        encoded = self.model.encode(tokens_BT, injections=injections, key=keys[0], remat=remat)
        start_B1 = jnp.full((len(tokens_BT), 1), self.model.token_ids.start, jnp.int32)
        hidden_B1D = self.model.decode_hidden(
            start_B1, encoded, injections=injections.of_decoder(), key=keys[1], remat=remat
        )
        return self.method.label_logits(hidden_B1D[:, 0].astype(jnp.float32))

    def encode(
        self, tokens_BT: Array | HostArray, *, task_B: Array | HostArray | None = None
    ) -> tuple[Encoded, Injections]:
        """The encoder's output, and the slots that the decoder still needs."""
        injections = self.injections(tokens_BT, task_B=task_B)
        return self.model.encode(tokens_BT, injections=injections), injections


def same_tokens(rows_XS: Array | HostArray, labels: LabelTokens, *, padding: int = 0) -> Array:
    """``[X, C]``: whether a row of tokens and padding is this label."""
    width = max(rows_XS.shape[1], *map(len, labels))
    padded = [[*label, *[padding] * (width - len(label))] for label in labels]
    behind = ((0, 0), (0, width - rows_XS.shape[1]))
    rows_XS = jnp.pad(jnp.asarray(rows_XS), behind, constant_values=padding)
    return jnp.all(rows_XS[:, None] == jnp.asarray(padded)[None], axis=2)


def shallow_copy(model: T5) -> T5:
    """A copy of the structure around the same arrays, whose modules may be changed."""
    copy: T5 = nnx.merge(*nnx.split(model))
    return copy


def trainable_mask(method: MethodConfig, names: list[str]) -> Mask:
    """Path -> whether it is trainable: the only truth about which parameters train."""
    return {name: method.trains(name) for name in names}
