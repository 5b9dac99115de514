"""The contract of a model: it reads an input, then writes a target.

Everything above ``models/`` uses a model through ``Model``: training, ranking, decoding, tuning
methods, planning and serving.  A new family is a folder here with a subclass of it, and a name
table in ``checkpoints/``.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.config import ModelConfig, TokenIds
from prompt_tuning_jax.models.embedding_uses import EmbeddingUse
from prompt_tuning_jax.models.injections import NO_INJECTIONS, Injections, KeyValues, ModelInput
from prompt_tuning_jax.models.layers import Embed, Remat, Table, put_in_front, split_key
from prompt_tuning_jax.models.ops.attention_choice import PLAIN, AttentionTraits
from prompt_tuning_jax.models.output_head import LOGITS_MB, LazyLogits, OutputHead
from prompt_tuning_jax.typing import Array, DType, HostArray


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Context:
    """What a model has read, and all that it needs to write.

    Attributes:
      hidden_BUD: the final hidden states of all positions.
      mask_BU: the real positions among them.
      keys_values: for each writing layer, the keys and values ``[B, U, G, K]`` of these positions.
      prompt: for each writing layer, those of the positions before them, ``[1 or B, P, G, K]``.  A
        decoder-only model computes them once for all rows.  In an encoder-decoder they are those of
        a prompt in the decoder.  Empty if there are none.
      prompt_lengths_B: how many of them each row has, the first ones; None is all.
    """

    hidden_BUD: Array
    mask_BU: Array
    keys_values: tuple[KeyValues, ...]
    prompt: tuple[KeyValues, ...] = ()
    prompt_lengths_B: Array | None = None

    @property
    def last_BD(self) -> Array:
        """The hidden state of each row's last real position."""
        last_B = jnp.max(jnp.where(self.mask_BU, jnp.arange(self.mask_BU.shape[1]), 0), axis=1)
        return jnp.take_along_axis(self.hidden_BUD, last_B[:, None, None], axis=1)[:, 0]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DecodeContext:
    """The part of a ``Context`` that step-by-step decoding needs.

    The leaves have one entry per row on axis 0, so that rows can be repeated, reordered, or kept
    in slots.  ``first_BD`` is the hidden state that predicts the first token, or None if the
    decoder computes it from the start token.  ``prompt`` is that of an encoder-decoder's
    ``Context``.
    """

    mask_BU: Array
    keys_values: tuple[KeyValues, ...]
    first_BD: Array | None = None
    prompt: tuple[KeyValues, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AttentionStack:
    """The sizes of one kind of attention: ``num_layers`` of them, with G heads of width K each.

    ``writes`` is false for attentions that only read, such as an encoder's.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    writes: bool = True


class Model(nnx.Module):
    """A frozen model that reads an input, with a prompt per example, and writes a target.

    Token arrays are padded at the end with ``token_ids.fill``; a model with ``config.reads_images``
    gets pixels instead, and its targets are numbers of classes.  ``dtype`` is the dtype of
    activations and matrix operands, and ``param_dtype`` is the dtype of the weights.  Norms,
    softmaxes and logits are computed in float32.

    Subclasses set ``token_embedder`` and implement the abstract methods.
    """

    # The stack that reads the input; deep prompts go into its layers.
    reading_stack: ClassVar[str]
    # Whether ``Injections.decoder_prompt`` is supported.
    has_decoder_prompts: ClassVar[bool] = False
    # Whether each position of the input predicts the next token, as in a decoder-only model; the
    # inputs of other models end with an end-of-sequence token.
    causal: ClassVar[bool]

    token_embedder: Embed  # or QuantizedEmbed

    def __init__(self, config: ModelConfig, *, dtype: DType, vocabulary: Any = None):
        self.config = config
        self.dtype = dtype
        self.vocabulary = vocabulary
        self.scan_layers = False  # whether equal layers run as one loop (models/layer_loop.py)
        self.attention = PLAIN  # how the stack that reads the input computes attention
        self.original_fingerprint = ""  # fingerprint of the weights before quantization
        # The largest float32 array of logits in losses and ranking, in millions of bytes.
        self.logits_mb = LOGITS_MB

    @property
    @abstractmethod
    def stacks(self) -> Mapping[str, AttentionStack]:
        """The attentions by name (``Injections.prefixes`` has the same names)."""

    @property
    def attention_traits(self) -> AttentionTraits:
        """What decides how ``reading_stack`` computes attention; by default it has one way."""
        stack = self.stacks[self.reading_stack]
        return AttentionTraits(
            name=self.reading_stack,
            head_dim=stack.head_dim,
            dtype=jnp.dtype(self.dtype).name,
            whole=False,
        )

    @abstractmethod
    def read(
        self,
        source: ModelInput,
        *,
        injections: Injections = NO_INJECTIONS,
        key: Array | None = None,
        remat: Remat = "none",
    ) -> Context:
        """Reads an embedded input; passing a ``key`` enables dropout."""

    @abstractmethod
    def write_hidden(
        self,
        context: Context,
        targets_BS: Array | HostArray,
        *,
        injections: Injections = NO_INJECTIONS,
        key: Array | None = None,
        remat: Remat = "none",
    ) -> Array:
        """Computes the output head's inputs ``[B, S, D]``; ``[:, s]`` predicts target ``s``."""

    def start_decoding(
        self, context: Context, max_length: int
    ) -> tuple[DecodeContext, tuple[KeyValues, ...]]:
        """Prepares step-by-step decoding of ``max_length`` tokens, with empty caches.

        A cache holds the keys and values that one writing layer has computed so far.
        """
        kept = DecodeContext(
            mask_BU=context.mask_BU, keys_values=context.keys_values, prompt=context.prompt
        )
        return kept, self._empty_caches(len(context.mask_BU), max_length)

    @abstractmethod
    def decode_step(
        self,
        tokens_B: Array,
        position: Array | int,
        caches: tuple[KeyValues, ...],
        context: DecodeContext,
        *,
        injections: Injections = NO_INJECTIONS,
    ) -> tuple[Array, tuple[KeyValues, ...]]:
        """Decodes one token; returns logits ``[B, V]`` and the updated caches.

        The logits predict token ``position``, and ``tokens_B`` are the tokens before it: at
        position 0 the start token, which a decoder-only model ignores.
        """

    @abstractmethod
    def logits(self, hidden: Array) -> Array:
        """Applies the output head, ``[..., D] -> [..., V]``; returns logits in float32."""

    def output_head(self) -> OutputHead:
        """Returns the output head; one of a linear map or a table can be computed in parts."""
        return OutputHead(layer=self.logits, vocab_size=self.config.vocab_size)

    @abstractmethod
    def output_vectors(self, tokens_N: Array | HostArray) -> Array:
        """Returns the output head's weight vectors ``[N, D]`` of these tokens, in float32."""

    @abstractmethod
    def keys_values_of(self, tokens_P: Array) -> dict[str, tuple[Array, Array]]:
        """Computes the keys and values ``[L, P, G, K]`` of a text in each stack, in float32."""

    def write(
        self,
        context: Context,
        targets_BS: Array | HostArray,
        *,
        injections: Injections = NO_INJECTIONS,
        key: Array | None = None,
        remat: Remat = "none",
    ) -> Array:
        """Computes the logits ``[B, S, V]`` of the targets; ``[:, s]`` predicts target ``s``."""
        return self.logits(
            self.write_hidden(context, targets_BS, injections=injections, key=key, remat=remat)
        )

    def lazy_logits(self, hidden: Array) -> LazyLogits:
        """Returns the logits of the output head's inputs ``[..., D]`` without computing them."""
        return LazyLogits(hidden=hidden, head=self.output_head(), max_mb=self.logits_mb)

    def for_labels(self, labels: Sequence[str], *, key: Array) -> "Model":
        """Returns the model with an output for each label, which ``key`` initializes.

        A language model writes every label already.
        """
        return self

    def untie(self, head_VD: Array) -> None:
        """Gives a model whose head is its embedding table, ``[V, D]``, this one as its head.

        Works in place.  Raises UserError for a family that cannot be so.
        """
        raise UserError(
            f"{type(self).__name__} has its embedding table as its output head and cannot have "
            "another; keep the adapter as it is"
        )

    def prompt_bound(self) -> float:
        """Returns v of a prompt that starts from [-v, v), as Jia et al. 2022 initialize it."""
        raise UserError(
            "method.init=xavier_uniform is for models that read images; use uniform, or words"
        )

    def embed_tokens(self, tokens: Array | HostArray) -> Array:
        """Embeds token ids, ``[...] -> [..., D]``; values at padding are meaningless."""
        return self._embedded(tokens)

    def _embedded(self, tokens: Array | HostArray, use: EmbeddingUse | None = None) -> Array:
        """Returns rows of the table; ``use`` is where, if methods can adapt this use of it."""
        if self.token_ids.fill < 0:
            tokens = jnp.maximum(jnp.asarray(tokens), 0)
        return self.token_embedder(tokens) if use is None else use(tokens, self.token_embedder)

    def embed(self, tokens_BT: Array | HostArray, prompt: Array | None = None) -> ModelInput:
        """Embeds tokens behind a prompt ``[P, D]`` or ``[B, P, D]``."""
        source = ModelInput(
            embeddings_BUD=self.embed_tokens(tokens_BT), mask_BU=tokens_BT != self.token_ids.fill
        )
        return source if prompt is None else with_prompt(source, prompt)

    def embedding_table(self) -> Table:
        """Returns the rows ``[V, D]`` of the vocabulary in the space of prompts."""
        return self.token_embedder.table()

    @property
    def token_ids(self) -> TokenIds:
        """The model's special token ids."""
        return self.config.token_ids

    @property
    def input_eos(self) -> int:
        """The id that ends an input: the vocabulary's, or the model's if there is no vocabulary.

        It is -1 if nothing ends an input (``token_ids.inputs_end``).
        """
        if not self.token_ids.inputs_end:
            return -1
        return self.token_ids.eos if self.vocabulary is None else int(self.vocabulary.eos_id)

    def run(
        self,
        inputs_BT: Array | HostArray,
        targets_BS: Array | HostArray,
        *,
        injections: Injections = NO_INJECTIONS,
        key: Array | None = None,
        remat: Remat = "none",
    ) -> Array:
        """Reads the inputs and computes the logits ``[B, S, V]`` of the targets.

        ``injections.model_input`` replaces the embedded inputs if it is given.
        """
        return self.logits(
            self.run_hidden(inputs_BT, targets_BS, injections=injections, key=key, remat=remat)
        )

    def run_hidden(
        self,
        inputs_BT: Array | HostArray,
        targets_BS: Array | HostArray,
        *,
        injections: Injections = NO_INJECTIONS,
        key: Array | None = None,
        remat: Remat = "none",
    ) -> Array:
        """Does ``run`` without the output head, and returns its inputs ``[B, S, D]``."""
        keys = split_key(key, 2)
        source = injections.model_input or self.embed(inputs_BT)
        context = self.read(source, injections=injections, key=keys[0], remat=remat)
        return self.write_hidden(
            context,
            targets_BS,
            injections=self.injections_for_writing(injections),
            key=keys[1],
            remat=remat,
        )

    def _empty_caches(self, rows: int, length: int) -> tuple[KeyValues, ...]:
        """Returns zeros as the keys and values of ``length`` positions in each writing layer."""
        stack = next(stack for stack in self.stacks.values() if stack.writes)
        zeros = jnp.zeros((rows, length, stack.num_kv_heads, stack.head_dim), self.dtype)
        return (KeyValues(key_BPGK=zeros, value_BPGK=zeros),) * stack.num_layers

    def injections_for_writing(self, injections: Injections) -> Injections:
        """Returns the injections that are still needed after the input has been read."""
        stacks = self.stacks
        kept = {name: prefix for name, prefix in injections.prefixes.items() if stacks[name].writes}
        return replace(
            injections, model_input=None, layer_prompts=None, prefixes=kept, decoder_prompt=None
        )

    def __repr__(self) -> str:
        """Describes the model's sizes without adapters; ``nnx.display`` shows every array."""
        config = self.config
        params = param_tree.split(self)[1]
        arrays = [array for name, array in params.items() if "/adapter/" not in name]
        number, size = sum(a.size for a in arrays), sum(a.nbytes for a in arrays)
        kinds = ", ".join(sorted({a.dtype.name for a in arrays}))
        layers = " + ".join(
            str(stack.num_layers) for name, stack in self.stacks.items() if name != "cross"
        )
        return (
            f"{type(self).__name__}({layers} layers, embed_dim={config.embed_dim}, "
            f"num_heads={config.num_heads}, mlp_dim={config.mlp_dim}, "
            f"vocab_size={config.vocab_size}: {number:,} parameters in {kinds}, "
            f"{size / 1e6:,.1f} MB)"
        )

    __str__ = __repr__


def model_class(config: ModelConfig) -> Any:
    """Returns the class of models with such a configuration."""
    module, _, name = config.implementation.partition(":")
    return getattr(import_module(module), name)


def stacked(layers: Sequence[KeyValues | None]) -> tuple[Array, Array]:
    """Stacks the keys and the values of a single row, ``[L, P, G, K]`` each, in float32."""
    rows: KeyValues = jax.tree.map(lambda *each: jnp.concatenate(each).astype(jnp.float32), *layers)
    return rows.key_BPGK, rows.value_BPGK


def with_prompt(source: ModelInput, prompt: Array) -> ModelInput:
    """Puts a prompt ``[P, D]``, or one per example ``[B, P, D]``, before the input.

    Raises UserError if the prompt has another number of dimensions or another width.
    """
    batch, _, width = source.embeddings_BUD.shape
    if prompt.ndim not in (2, 3) or prompt.shape[-1] != width:
        raise UserError(
            f"a prompt for this model has shape [P, {width}] or [{batch}, P, {width}]; "
            f"got {list(prompt.shape)}"
        )
    prompt_BPD = prompt if prompt.ndim == 3 else prompt[None]
    return replace(source, prompt_BPD=prompt_BPD.astype(source.embeddings_BUD.dtype))


def joined(source: ModelInput) -> ModelInput:
    """Makes the prompt a part of the embeddings, ``[B, P + U, D]``, for each row.

    All positions see the prompt, and the prompt sees all positions (Lester et al. 2021, section
    2), unless ``prompt_mask_PP`` or ``attention_mask_BUU`` says otherwise.
    """
    prompt_BPD = source.prompt_BPD
    if prompt_BPD is None:
        return source
    length = prompt_BPD.shape[1]
    if source.prompt_mask_PP is not None:
        whole = length + source.embeddings_BUD.shape[1]
        prompt_PU = jnp.pad(source.prompt_mask_PP, ((0, 0), (0, whole - length)))
        input_TU = jnp.ones((whole - length, whole), bool)
        seen_1UU = jnp.concatenate([prompt_PU, input_TU])[None]
        source = replace(source, prompt_mask_PP=None, attention_mask_BUU=seen_1UU)
    return replace(
        source,
        prompt_BPD=None,
        embeddings_BUD=put_in_front(prompt_BPD, source.embeddings_BUD),
        mask_BU=jnp.pad(source.mask_BU, ((0, 0), (length, 0)), constant_values=True),
    )
