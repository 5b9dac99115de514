"""Decoder-only language models: one stack of layers reads the prompt and the input, and writes.

The prompt does not depend on the input, so the stack computes its keys and values once for all
rows; the rows then run over their own positions alone.  The result is that of putting the prompt
before every row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax.models.base import (
    AttentionStack,
    Context,
    DecodeContext,
    Model,
    joined,
    stacked,
)
from prompt_tuning_jax.models.causal_lm.config import CausalLMConfig
from prompt_tuning_jax.models.causal_lm.past_keys import (
    PastKeys,
    concatenate_positions,
    consecutive,
    num_positions,
    past_keys,
    positions_in,
)
from prompt_tuning_jax.models.causal_lm.stack import PositionEmbedder, Stack
from prompt_tuning_jax.models.causal_lm.whole_attention import stack_traits
from prompt_tuning_jax.models.embedding_uses import EmbeddingUse, TiedHead
from prompt_tuning_jax.models.injections import (
    NO_INJECTIONS,
    Injections,
    KeyValues,
    LayerPrompt,
    ModelInput,
)
from prompt_tuning_jax.models.layers import (
    Embed,
    LayerNorm,
    Linear,
    Remat,
    ScaledTable,
    Table,
    dropout,
    linear_from,
    make_head,
    split_key,
)
from prompt_tuning_jax.models.ops.attention_choice import AttentionTraits
from prompt_tuning_jax.models.output_head import OutputHead
from prompt_tuning_jax.typing import Array, DType, HostArray


class Decoder(Stack):
    """The stack, with the uses of the embedding table that methods can adapt."""

    def __init__(
        self,
        config: CausalLMConfig,
        *,
        dtype: DType,
        param_dtype: DType,
        dropout_rate: float,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            config,
            name="decoder",
            dtype=dtype,
            param_dtype=param_dtype,
            dropout_rate=dropout_rate,
            rngs=rngs,
        )
        self.embed_tokens = EmbeddingUse()
        if config.tie_embeddings:
            self.tied_logits = TiedHead()


class CausalLM(Model):
    """A decoder-only language model that accepts a prompt per example.

    Positions count the prompt and the real tokens of a row: token t has the position P + t, however
    the row is padded.
    """

    reading_stack: ClassVar[str] = "decoder"
    causal: ClassVar[bool] = True

    config: CausalLMConfig

    def __init__(
        self,
        config: CausalLMConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
        dropout_rate: float = 0.0,
        vocabulary: Any = None,
    ):
        super().__init__(config, dtype=dtype, vocabulary=vocabulary)
        self.dropout_rate = dropout_rate
        self.token_embedder = Embed(
            config, dtype=dtype, param_dtype=param_dtype, rngs=rngs, std=config.embed_dim**-0.5
        )
        if config.positions == "learned":
            self.position_embedder = PositionEmbedder(config, param_dtype=param_dtype, rngs=rngs)
        if config.embedding_norm:
            self.embedding_norm = LayerNorm(
                config.embed_dim, eps=config.norm_eps, dtype=dtype, param_dtype=param_dtype
            )
        self.decoder = Decoder(
            config,
            dtype=dtype,
            param_dtype=param_dtype,
            dropout_rate=dropout_rate,
            rngs=rngs,
        )

    @property
    def stacks(self) -> Mapping[str, AttentionStack]:
        config = self.config
        stack = AttentionStack(
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
        )
        return {"decoder": stack}

    @property
    def attention_traits(self) -> AttentionTraits:
        return stack_traits(self.config, "decoder", dtype=self.dtype, causal=True)

    def embed_tokens(self, tokens: Array | HostArray) -> Array:
        x = self._embedded(tokens, self.decoder.embed_tokens)
        scale = self.config.embedding_scale
        # Gemma rounds the factor to the dtype of the activations, and so does transformers.
        return x if scale == 1.0 else x * jnp.asarray(scale, x.dtype)

    def embedding_table(self) -> Table:
        table, scale = self.token_embedder.table(), self.config.embedding_scale
        if scale == 1.0:
            return table
        return ScaledTable(table=table, scale=scale, dtype=self.dtype)

    def read(
        self,
        source: ModelInput,
        *,
        injections: Injections = NO_INJECTIONS,
        key: Array | None = None,
        remat: Remat = "none",
    ) -> Context:
        """Reads an embedded input; ``hidden_BUD`` has the T positions behind the prompt.

        The prompt runs through the stack by itself, once, unless ``attention_mask_BUU`` or a layer
        prompt longer than it makes it depend on the row.  Prefixes come before the prompt; if
        their lengths differ between rows, there can be no prompt.
        """
        assert source.prompt_BPD is None or injections.prefix_lengths_B is None
        keys = split_key(key, 2)
        prefix = tuple(
            KeyValues(
                key_BPGK=prefix.key_BPGK.astype(self.dtype),
                value_BPGK=prefix.value_BPGK.astype(self.dtype),
            )
            for prefix in injections.prefixes.get("decoder", ())
        )
        lengths_B = injections.prefix_lengths_B
        past = [past_keys(prefix, lengths_B=lengths_B)] if prefix else []
        # A row's positions start behind those of its prefix.
        start = num_positions(prefix) if lengths_B is None else lengths_B[:, None]
        layer_prompts = injections.layer_prompts
        prompt_length = 0 if source.prompt_BPD is None else source.prompt_BPD.shape[1]
        prompt: tuple[KeyValues, ...] = ()
        last_B1D = None
        if prompt_length and _separable(source, layer_prompts):
            assert source.prompt_BPD is not None
            seen_PP = source.prompt_mask_PP
            last_B1D, prompt = self._run(
                _broadcast_for(layer_prompts, source.prompt_BPD),
                consecutive(start, prompt_length),
                past,
                mask_BTT=None if seen_PP is None else seen_PP[None],
                layer_prompts=layer_prompts,
                key=keys[0],
                remat=remat,
                last_only=True,
            )
            layer_prompts, prompt_length = None, 0
            past = [*past, past_keys(prompt, start=start)]
            source = replace(source, prompt_BPD=None, prompt_mask_PP=None)
        whole = joined(source)
        if whole.embeddings_BUD.shape[1]:
            hidden_BUD, keys_values = self._run(
                whole.embeddings_BUD,
                positions_in(whole.mask_BU, start=start + num_positions(prompt)),
                past,
                mask_BT=whole.mask_BU,
                mask_BTT=whole.attention_mask_BUU,
                layer_prompts=layer_prompts,
                key=keys[1],
                remat=remat,
            )
        else:  # Only the prompt is read, for its keys and values.
            hidden_BUD = whole.embeddings_BUD
            keys_values = self._empty_caches(len(hidden_BUD), 0)
        if prompt_length:
            last_B1D = hidden_BUD[:, prompt_length - 1 : prompt_length]
            prompt = jax.tree.map(lambda x: x[:, :prompt_length], keys_values)
            keys_values = jax.tree.map(lambda x: x[:, prompt_length:], keys_values)
            hidden_BUD = hidden_BUD[:, prompt_length:]
        if last_B1D is not None and hidden_BUD.shape[1]:
            # A row without tokens continues the prompt.
            empty_B11 = ~jnp.any(source.mask_BU, axis=1)[:, None, None]
            first_B1D = jnp.where(empty_B11, last_B1D, hidden_BUD[:, :1])
            hidden_BUD = jnp.concatenate([first_B1D, hidden_BUD[:, 1:]], axis=1)
        return Context(
            hidden_BUD=hidden_BUD,
            mask_BU=source.mask_BU,
            keys_values=keys_values,
            prompt=concatenate_positions(prefix, prompt),
            prompt_lengths_B=lengths_B,
        )

    def write_hidden(
        self,
        context: Context,
        targets_BS: Array | HostArray,
        *,
        injections: Injections = NO_INJECTIONS,
        key: Array | None = None,
        remat: Remat = "none",
    ) -> Array:
        """Computes the output head's inputs ``[B, S, D]``; ``[:, s]`` predicts target ``s``.

        The context has the prefixes, so ``injections`` need not.
        """
        first_B1D = context.last_BD[:, None]
        if targets_BS.shape[1] == 1:
            return first_B1D
        lengths_B = context.prompt_lengths_B
        start = num_positions(context.prompt) if lengths_B is None else lengths_B[:, None]
        past = [past_keys(context.prompt, lengths_B=lengths_B)] if context.prompt else []
        past.append(past_keys(context.keys_values, start=start, mask_BU=context.mask_BU))
        start_B1 = start + jnp.sum(context.mask_BU, axis=1, keepdims=True)
        x_BSD, _ = self._run(
            self.embed_tokens(targets_BS[:, :-1]),
            start_B1 + jnp.arange(targets_BS.shape[1] - 1),
            past,
            key=key,
            remat=remat,
        )
        return jnp.concatenate([first_B1D, x_BSD], axis=1)

    def start_decoding(
        self, context: Context, max_length: int
    ) -> tuple[DecodeContext, tuple[KeyValues, ...]]:
        batch = context.mask_BU.shape[0]
        seen_BP = jnp.ones((batch, num_positions(context.prompt)), bool)
        if context.prompt_lengths_B is not None:
            seen_BP = jnp.arange(seen_BP.shape[1]) < context.prompt_lengths_B[:, None]
        kept = DecodeContext(
            mask_BU=jnp.concatenate([seen_BP, context.mask_BU], axis=1),
            keys_values=concatenate_positions(context.prompt, context.keys_values),
            first_BD=context.last_BD,
        )
        return kept, self._empty_caches(batch, max_length)

    def decode_step(
        self,
        tokens_B: Array,
        position: Array | int,
        caches: tuple[KeyValues, ...],
        context: DecodeContext,
        *,
        injections: Injections = NO_INJECTIONS,
    ) -> tuple[Array, tuple[KeyValues, ...]]:
        """Decodes one token; at position 0 the logits follow from the context alone."""
        assert context.first_BD is not None
        first_BD = context.first_BD

        def first() -> tuple[Array, tuple[KeyValues, ...]]:
            return first_BD, caches

        def later() -> tuple[Array, tuple[KeyValues, ...]]:
            slot = position - 1
            past = past_keys(context.keys_values, mask_BU=context.mask_BU)
            x_B1D, written = self._run(
                self.embed_tokens(tokens_B[:, None]),
                jnp.sum(context.mask_BU, axis=1, keepdims=True) + slot,
                [past],
                caches=caches,
                slot=slot,
            )
            return x_B1D[:, 0].astype(first_BD.dtype), written

        if isinstance(position, int):
            hidden_BD, caches = first() if position == 0 else later()
        else:
            hidden_BD, caches = jax.lax.cond(position == 0, first, later)
        return self.logits(hidden_BD), caches

    def logits(self, hidden: Array) -> Array:
        return self.output_head().logits(hidden)

    def output_head(self) -> OutputHead:
        config = self.config
        tied = config.tie_embeddings
        decoder = self.decoder
        layer = decoder.tied_logits.layer(self.token_embedder) if tied else decoder.logits_dense
        return OutputHead(layer=layer, vocab_size=config.vocab_size, cap=config.logits_softcap)

    def untie(self, head_VD: Array) -> None:
        def like() -> Linear:
            return make_head(
                self.config, dtype=self.dtype, param_dtype=head_VD.dtype, rngs=nnx.Rngs(0)
            )

        self.decoder.logits_dense = linear_from(head_VD.T, like)
        self.config = replace(self.config, tie_embeddings=False)
        self.decoder.config = self.config

    def output_vectors(self, tokens_N: Array | HostArray) -> Array:
        if self.config.tie_embeddings:
            return self.token_embedder.table()[tokens_N].astype(jnp.float32)
        return self.decoder.logits_dense.columns(tokens_N).T

    def keys_values_of(self, tokens_P: Array) -> dict[str, tuple[Array, Array]]:
        return {"decoder": stacked(self.read(self.embed(tokens_P[None])).keys_values)}

    def _run(
        self,
        x_BTD: Array,
        positions_BT: Array,
        past: Sequence[PastKeys],
        *,
        mask_BT: Array | None = None,
        mask_BTT: Array | None = None,
        layer_prompts: Sequence[LayerPrompt | None] | None = None,
        caches: tuple[KeyValues, ...] | None = None,
        slot: Array | int = 0,
        key: Array | None = None,
        remat: Remat = "none",
        last_only: bool = False,
    ) -> tuple[Array, tuple[KeyValues, ...]]:
        """Runs the stack over embedded tokens or prompts, which get their positions here."""
        keys = split_key(key, 2)
        if self.config.positions == "learned":
            x_BTD = x_BTD + self.position_embedder(positions_BT).astype(x_BTD.dtype)
        if self.config.embedding_norm:
            x_BTD = self.embedding_norm(x_BTD)
        x_BTD = dropout(x_BTD, self.dropout_rate, key=keys[0], shared_axis=-2)
        return self.decoder(
            x_BTD,
            positions_BT,
            past,
            mask_BT=mask_BT,
            mask_BTT=mask_BTT,
            layer_prompts=layer_prompts,
            caches=caches,
            slot=slot,
            key=keys[1],
            remat=remat,
            scan=self.scan_layers,
            attention=self.attention.implementation,
            last_only=last_only,
        )


def _separable(source: ModelInput, layer_prompts: Sequence[LayerPrompt | None] | None) -> bool:
    """Returns whether the prompt's keys and values do not depend on the row behind it."""
    assert source.prompt_BPD is not None
    longest = max((p.vectors_BPD.shape[1] for p in layer_prompts or () if p), default=0)
    return source.attention_mask_BUU is None and longest <= source.prompt_BPD.shape[1]


def _broadcast_for(layer_prompts: Sequence[LayerPrompt | None] | None, x_BPD: Array) -> Array:
    """Repeats a prompt of all rows if the prompts of its layers differ between rows."""
    batches = [p.vectors_BPD.shape[0] for p in layer_prompts or () if p is not None]
    return jnp.broadcast_to(x_BPD, (max([x_BPD.shape[0], *batches]), *x_BPD.shape[1:]))
