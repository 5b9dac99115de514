"""The contract of a tuning method: a module attached to a frozen model."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeAlias, TypeVar

import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.config.methods import MethodConfig, is_attached
from prompt_tuning_jax.data.vocabularies.vocab import Vocabulary
from prompt_tuning_jax.models.base import Context as ModelContext
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.models.injections import NO_INJECTIONS, Injections
from prompt_tuning_jax.models.layers import Remat, split_key
from prompt_tuning_jax.models.losses import TokenSums, class_sums, token_sums
from prompt_tuning_jax.models.output_head import LazyLogits
from prompt_tuning_jax.typing import Array, FlatParams, HostArray, Mask

C = TypeVar("C", bound=MethodConfig)
PROMPT = "method/prompt_PD"  # the path of a plain prompt, as prompt tuning trains it
DECODER_PROMPT = "method/decoder_prompt_PD"  # that of a prompt in the decoder
# The tokens of each label, the end of sequence included.
LabelTokens: TypeAlias = tuple[tuple[int, ...], ...]
# The log-probability of a label unknown to the method.  It is finite so that means stay finite.
UNKNOWN_LABEL_LOG_PROB = -1e10


@dataclass(frozen=True, kw_only=True)
class Context:
    """The inputs of a method other than its config and the model."""

    labels: tuple[str, ...] = ()
    vocabulary: Vocabulary | None = None
    num_tasks: int = 1
    # The initial arrays for init=file and init=source, by path.
    init_arrays: Mapping[str, HostArray] = field(default_factory=dict)
    # The text of the file for init=text, and examples with their inputs and targets.
    init_text: str = ""
    examples: tuple[Mapping[str, str], ...] = ()


class TuningModule(nnx.Module, Generic[C]):
    """The parameters that a method adds to a model, and the injections computed from them.

    This base class implements methods that add no parameters: attaching it leaves the model
    unchanged, and it injects nothing.
    """

    def __init__(self, config: C):
        self.config = config

    @classmethod
    def attach(cls, config: C, model: Model, *, key: Array, context: Context) -> "TunedModel":
        """Returns the model with new parameters, which ``key`` initializes.

        Implementations must not modify ``model``; a method that inserts adapters works on a
        ``shallow_copy``.
        """
        return TunedModel(model, cls(config))

    def for_inference(self, model: Model) -> "TunedModel":
        """Returns the model with the method in the form that a run saves.

        The resulting config (``method.config``) can be attached with a ``Context`` that contains
        only the labels.
        """
        return TunedModel(model, self)

    def injections(
        self,
        model: Model,
        tokens_BT: Array | HostArray,
        *,
        task_B: Array | HostArray | None = None,
        key: Array | None = None,
    ) -> Injections:
        """Computes the injections for one batch of input tokens.

        ``task_B`` (int32) is the task number of each row if the data mixes several tasks.  Passing
        a ``key`` enables dropout.
        """
        return NO_INJECTIONS

    def context_sums(self, model: Model, *, z_loss: float = 0.0) -> TokenSums | None:
        """Computes the loss of what the method puts before each input, once for all rows.

        Only training adds it to the loss of the targets.  None means that there is none.
        """
        return None

    def constrained(self, before: FlatParams, after: FlatParams) -> FlatParams:
        """Returns the trainable parameters after an update, kept within the method's bounds."""
        return after

    @property
    def label_tokens(self) -> LabelTokens:
        """The tokens of the labels that the method scores itself; empty if it scores none."""
        return ()

    def label_logits(self, hidden_BD: Array) -> Array:
        """Scores ``label_tokens`` from the output head's input that predicts the first token.

        Returns logits ``[B, C]``.
        """
        raise NotImplementedError

    def with_dropout(self, model: Model, *, key: Array) -> Model:
        """Returns the model with dropout enabled in the modules that the method inserted.

        ``model`` is not modified.  The returned copy holds the keys of this call and is discarded
        after it.
        """
        return model


class Known:
    """The file metadata of an attached method and the config of its run; None if unknown.

    All instances compare equal, so models that differ only in this field share compiled programs.
    """

    def __init__(self, about: Any = None, run: Any = None) -> None:
        self.about, self.run = about, run

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Known)

    def __hash__(self) -> int:
        return hash(Known)


class TunedModel(nnx.Module):
    """A model with a method attached; parameter paths are ``model/...`` and ``method/...``."""

    def __init__(self, model: Model, method: TuningModule[Any]):
        self.model = model
        self.method = method
        self.known = Known()

    def __repr__(self) -> str:
        """Describes the model and lists the attached arrays with their shapes."""
        params = param_tree.split(self)[1]
        attached = {name: array for name, array in params.items() if is_attached(name)}
        shown = [f"{name} {list(array.shape)}" for name, array in [*attached.items()][:3]]
        shown += [f"{len(attached) - 3} more"] * (len(attached) > 3)
        return (
            f"{self.model!r} with {type(self.method).__name__}: "
            f"{sum(array.size for array in attached.values()):,} parameters ({', '.join(shown)})"
        )

    def for_inference(self) -> "TunedModel":
        """Returns an equivalent model without the parts that only training needs.

        This is the form that a run saves.
        """
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
        inputs_BT: Array | HostArray,
        targets_BS: Array | HostArray,
        *,
        task_B: Array | HostArray | None = None,
        key: Array | None = None,
        remat: Remat = "none",
    ) -> Array:
        """Computes float32 logits ``[B, S, V]`` of the targets; a ``key`` enables dropout."""
        lazy = self.lazy_logits(inputs_BT, targets_BS, task_B=task_B, key=key, remat=remat)
        return lazy.head.logits(lazy.hidden)

    def lazy_logits(
        self,
        inputs_BT: Array | HostArray,
        targets_BS: Array | HostArray,
        *,
        task_B: Array | HostArray | None = None,
        key: Array | None = None,
        remat: Remat = "none",
    ) -> LazyLogits:
        """Runs the model without its output head, and returns the logits that this would give."""
        injections = self.injections(inputs_BT, task_B=task_B, key=key)
        model = self.model if key is None else self.method.with_dropout(self.model, key=key)
        hidden_BSD = model.run_hidden(
            inputs_BT, targets_BS, injections=injections, key=key, remat=remat
        )
        return model.lazy_logits(hidden_BSD)

    def token_sums(
        self,
        inputs_BT: Array | HostArray,
        targets_BS: Array | HostArray,
        *,
        task_B: Array | HostArray | None = None,
        key: Array | None = None,
        remat: Remat = "none",
        z_loss: float = 0.0,
        weights_B: Array | HostArray | None = None,
        training: bool = False,
        copies: int = 1,
    ) -> TokenSums:
        """Computes the loss: the summed cross entropy of the target tokens.

        If the method scores labels itself, the loss is the cross entropy of choosing the target
        among its labels.  ``training`` adds the method's own ``context_sums`` for each example.
        ``copies`` is how often a ``vmap`` around it computes this at once; the logits of all share
        the bound of the model.
        """
        labels = self.method.label_tokens
        if labels:
            logits_BC = self.label_logits(inputs_BT, task_B=task_B, key=key, remat=remat)
            same_BC = same_tokens(targets_BS, labels, padding=self.model.token_ids.fill)
            class_B = jnp.where(same_BC.any(axis=1), jnp.argmax(same_BC, axis=1), -1)
            return class_sums(logits_BC, class_B, z_loss=z_loss, weights_B=weights_B)
        lazy = self.lazy_logits(inputs_BT, targets_BS, task_B=task_B, key=key, remat=remat)
        lazy = replace(lazy, copies=copies)
        fill = self.model.token_ids.fill
        sums = token_sums(lazy, targets_BS, z_loss=z_loss, padding=fill, weights_B=weights_B)
        context = self.method.context_sums(self.model, z_loss=z_loss) if training else None
        if context is None:
            return sums
        examples = sums.examples
        if weights_B is not None:
            some_B = jnp.any(jnp.asarray(targets_BS) != fill, axis=1)
            examples = jnp.sum(jnp.where(some_B, jnp.asarray(weights_B, jnp.float32), 0.0))
        return replace(
            sums,
            loss=sums.loss + examples * context.loss,
            tokens=sums.tokens + examples * context.tokens,
        )

    def label_logits(
        self,
        inputs_BT: Array | HostArray,
        *,
        task_B: Array | HostArray | None = None,
        key: Array | None = None,
        remat: Remat = "none",
    ) -> Array:
        """Computes the method's scores ``[B, C]`` of its ``label_tokens``."""
        keys = split_key(key, 2)
        context, injections = self.read(
            inputs_BT, task_B=task_B, key=keys[0], method_key=key, remat=remat
        )
        # What predicts the first target does not depend on the targets.
        any_B1 = jnp.full((len(inputs_BT), 1), self.model.token_ids.fill, jnp.int32)
        hidden_B1D = self.model.write_hidden(
            context, any_B1, injections=injections, key=keys[1], remat=remat
        )
        return self.method.label_logits(hidden_B1D[:, 0].astype(jnp.float32))

    def read(
        self,
        inputs_BT: Array | HostArray,
        *,
        task_B: Array | HostArray | None = None,
        key: Array | None = None,
        method_key: Array | None = None,
        remat: Remat = "none",
    ) -> tuple[ModelContext, Injections]:
        """Returns what the model has read, and the injections that writing still needs."""
        injections = self.injections(inputs_BT, task_B=task_B, key=method_key)
        source = injections.model_input or self.model.embed(inputs_BT)
        context = self.model.read(source, injections=injections, key=key, remat=remat)
        return context, self.model.injections_for_writing(injections)


def same_tokens(rows_XS: Array | HostArray, labels: LabelTokens, *, padding: int = 0) -> Array:
    """Returns a boolean ``[X, C]``: whether each row of padded tokens equals each label."""
    width = max(rows_XS.shape[1], *map(len, labels))
    padded = [[*label, *[padding] * (width - len(label))] for label in labels]
    behind = ((0, 0), (0, width - rows_XS.shape[1]))
    rows_XS = jnp.pad(jnp.asarray(rows_XS), behind, constant_values=padding)
    return jnp.all(rows_XS[:, None] == jnp.asarray(padded)[None], axis=2)


def shallow_copy(model: Model) -> Model:
    """Copies the module structure but shares the arrays; the copy's modules may be modified."""
    copy: Model = nnx.merge(*nnx.split(model))
    return copy


def trainable_mask(method: MethodConfig, names: list[str]) -> Mask:
    """Maps each path to whether it is trainable; the only source of this information."""
    return {name: method.trains(name) for name in names}
