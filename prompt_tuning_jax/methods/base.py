"""The contract of a tuning method: how it attaches to a frozen T5, and what it trains."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.config.base import Config
from prompt_tuning_jax.data.vocabularies.vocab import Vocabulary
from prompt_tuning_jax.inference.decoding.rank import rank
from prompt_tuning_jax.models.injections import NO_INJECTIONS, Injections
from prompt_tuning_jax.models.layers import split_key
from prompt_tuning_jax.models.t5.blocks import Remat
from prompt_tuning_jax.models.t5.model import T5, Encoded
from prompt_tuning_jax.training.losses import TokenSums, class_sums, token_sums
from prompt_tuning_jax.typing import Array, HostArray, Mask

# Of each label its tokens, the end of sequence included.
LabelTokens: TypeAlias = tuple[tuple[int, ...], ...]
UNKNOWN_LABEL_LOG_PROB = (
    -1e10
)  # the log-probability of a label that is not known; finite, for means of it


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a method may depend on besides the model: the data's labels and tasks, the words."""

    labels: tuple[str, ...] = ()
    vocabulary: Vocabulary | None = None
    tasks: int = 1  # how many


class TuningModule(nnx.Module):
    """What a method adds to a model: parameters, and the slots that they fill.

    Fills none unless overridden.
    """

    def injections(
        self,
        model: T5,
        tokens_BT: Array | HostArray,
        *,
        task_B: Array | HostArray | None = None,
        key: Array | None = None,
    ) -> Injections:
        """The slots for one batch of encoder tokens.

        ``task_B`` int32 is the number of each row's task in the mixture, where the data has
        several; with a ``key``, dropout is on.
        """
        return NO_INJECTIONS

    @property
    def label_tokens(self) -> LabelTokens:
        """The labels that the method scores itself, as tokens; none: by their text."""
        return ()

    def label_logits(self, hidden_BD: Array) -> Array:
        """``[B, C]`` for ``label_tokens`` from what the head reads at the first position."""
        raise NotImplementedError

    def with_dropout(self, model: T5, *, key: Array) -> T5:
        """The model to run where dropout is on: modules that a method has put into it get keys.

        ``model`` itself stays as it is: a copy that holds this call's keys cannot outlive it.
        """
        return model


def is_attached(name: str) -> bool:
    """Whether a parameter of a ``TunedModel`` with this path is none of the bare model's."""
    return name.startswith("method/") or "/adapter/" in name


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

    def __init__(self, model: T5, method: TuningModule):
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
        """What training makes smaller: the cross entropy of the targets' tokens.

        Of the targets as a choice among labels, where the method scores these itself.
        """
        labels = self.method.label_tokens
        if labels:
            injections = self.injections(encoder_input_tokens, task_B=task_B, key=key)
            logits_BC = self._own_label_logits(
                encoder_input_tokens, injections, key=key, remat=remat
            )
            same_BC = same_tokens(targets_BS, labels, padding=self.model.token_ids.fill)
            class_B = jnp.where(same_BC.any(axis=1), jnp.argmax(same_BC, axis=1), -1)
            return class_sums(logits_BC, class_B, z_loss=z_loss, weights_B=weights_B)
        logits_BSV = self(
            encoder_input_tokens, decoder_input_tokens, task_B=task_B, key=key, remat=remat
        )
        fill = self.model.token_ids.fill
        return token_sums(logits_BSV, targets_BS, z_loss=z_loss, padding=fill, weights_B=weights_B)

    def label_scores(
        self,
        tokens_BT: Array,
        labels_CS: Array,
        *,
        task_B: Array | HostArray | None = None,
        max_logits: int = 2**26,
        normalize_length: bool = False,
    ) -> Array:
        """``[B, C]``: the log-probability of each label, for ranking; see ``decoding.rank``.

        The encoder and the cross-attention keys are computed once per example.
        ``normalize_length`` makes it the mean over the label's tokens; a method that scores
        labels itself has no tokens to average over.
        """
        own = self.method.label_tokens
        if own:
            injections = self.injections(tokens_BT, task_B=task_B)
            log_probs_BC = jax.nn.log_softmax(self._own_label_logits(tokens_BT, injections))
            same_CC = same_tokens(labels_CS, own, padding=self.model.token_ids.fill)
            chosen_BC = log_probs_BC[:, jnp.argmax(same_CC, axis=1)]
            return jnp.where(same_CC.any(axis=1), chosen_BC, UNKNOWN_LABEL_LOG_PROB)
        encoded, injections = self.encode(tokens_BT, task_B=task_B)
        rest = injections.of_decoder()

        def decode_logits(decoder_input_S: Array) -> Array:
            tokens_BS = jnp.broadcast_to(decoder_input_S, (len(tokens_BT), *decoder_input_S.shape))
            return self.model.decode(tokens_BS, encoded, injections=rest)

        ids = self.model.token_ids
        return rank(
            decode_logits,
            labels_CS,
            normalize_length=normalize_length,
            start_id=ids.start,
            padding=ids.fill,
            max_logits=max_logits,
        )

    def _own_label_logits(
        self,
        tokens_BT: Array | HostArray,
        injections: Injections,
        *,
        key: Array | None = None,
        remat: Remat = "none",
    ) -> Array:
        """The method's own scores of its labels, from the decoder's first position."""
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


class Method(Config, ABC):
    """A frozen dataclass of hyper-parameters that knows how to attach itself.

    Its docstring says how many parameters it trains.  ``identity_at_init`` promises that the model
    computes with fresh parameters what it computes without.  ``scores_labels`` says that the method
    scores labels itself and generates no text; ``mergeable`` that a plain T5's weights can hold
    what it tunes.  ``default_optimizer`` holds the fields of ``Optimizer`` in which it differs from
    prompt tuning.
    """

    identity_at_init: ClassVar[bool] = False
    scores_labels: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False
    default_optimizer: ClassVar[Mapping[str, Any]] = {}

    @abstractmethod
    def attach(self, model: T5, *, key: Array, context: Context) -> TunedModel:
        """The model with fresh parameters of this method; ``key`` decides their initial value.

        ``model`` itself stays as it is: a method that fills its modules' slots takes a
        ``shallow_copy`` of it.
        """
        ...

    def trains(self, name: str) -> bool:
        """Whether the parameter of a ``TunedModel`` with this path trains."""
        return is_attached(name)

    def prompt_positions(self) -> int:
        """How many positions it adds to the encoder's input."""
        return 0

    def uses_rng(self) -> bool:
        """Whether training draws random numbers for it (dropout of its own)."""
        return False

    def config_errors(self) -> Iterator[str]:
        """A line for each field that makes no sense, the field as ``method.NAME``."""
        yield from ()

    def for_inference(self, attached: TunedModel) -> "tuple[Method, TunedModel]":
        """The same function without what only training needs, and the method that it then is.

        This is what is kept of a run.  The method that comes out attaches itself with no more of
        a ``Context`` than the labels.
        """
        return self, attached


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


def trainable_mask(method: Method, names: list[str]) -> Mask:
    """The mask, the only truth about what trains: path -> trainable."""
    return {name: method.trains(name) for name in names}
