"""T5Gemma: an encoder that sees in both directions, and a decoder that attends to its output."""

from collections.abc import Sequence
from dataclasses import dataclass
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
    consecutive,
    num_positions,
    past_keys,
    positions_in,
)
from prompt_tuning_jax.models.causal_lm.stack import Stack
from prompt_tuning_jax.models.causal_lm.whole_attention import stack_traits
from prompt_tuning_jax.models.injections import NO_INJECTIONS, Injections, KeyValues, ModelInput
from prompt_tuning_jax.models.layers import Embed, Remat, ScaledTable, Table, dropout, split_key
from prompt_tuning_jax.models.ops.attention_choice import AttentionTraits
from prompt_tuning_jax.models.output_head import OutputHead
from prompt_tuning_jax.models.t5gemma.config import T5GemmaConfig
from prompt_tuning_jax.typing import Array, DType, HostArray


class T5Gemma(Model):
    """A T5Gemma, or the text part of a T5Gemma 2, that accepts a prompt per example.

    The prompt comes before the embedded and scaled input, and the decoder, which starts from
    ``token_ids.start``, sees it through the encoder's output.  Real tokens have the positions
    behind the prompt, however the row is padded.
    """

    config: T5GemmaConfig
    reading_stack: ClassVar[str] = "encoder"
    causal: ClassVar[bool] = False

    def __init__(
        self,
        config: T5GemmaConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
        dropout_rate: float = 0.0,
        vocabulary: Any = None,
    ):
        super().__init__(config, dtype=dtype, vocabulary=vocabulary)
        self.dropout_rate = dropout_rate

        def embed(stack: CausalLMConfig) -> Embed:
            std = stack.embed_dim**-0.5
            return Embed(stack, dtype=dtype, param_dtype=param_dtype, rngs=rngs, std=std)

        self.token_embedder = embed(config.encoder)
        if not config.shares_table:
            self.decoder_embedder = embed(config.decoder)
        if config.eoi >= 0:
            zeros_D = jnp.zeros((config.embed_dim,), param_dtype)
            self.eoi_embedding = nnx.Param(zeros_D, logical_axes=("embed",))
            if not config.shares_table:
                self.decoder_eoi_embedding = nnx.Param(zeros_D, logical_axes=("embed",))
        self.encoder = Stack(
            config.encoder,
            name="encoder",
            dtype=dtype,
            param_dtype=param_dtype,
            dropout_rate=dropout_rate,
            rngs=rngs,
            windows=config.encoder_windows(),
        )
        self.decoder = Stack(
            config.decoder,
            name="decoder",
            dtype=dtype,
            param_dtype=param_dtype,
            dropout_rate=dropout_rate,
            rngs=rngs,
            cross_features=None if config.merged else config.embed_dim,
        )

    @property
    def stacks(self) -> dict[str, AttentionStack]:
        """The attentions by name; a merged attention is ``decoder``, and has no ``cross``."""
        encoder, decoder = self.config.encoder, self.config.decoder
        written = AttentionStack(
            num_layers=decoder.num_layers,
            num_kv_heads=decoder.num_kv_heads,
            head_dim=decoder.head_dim,
        )
        read = AttentionStack(
            num_layers=encoder.num_layers,
            num_kv_heads=encoder.num_kv_heads,
            head_dim=encoder.head_dim,
            writes=False,
        )
        stacks = {"encoder": read, "decoder": written}
        return stacks if self.config.merged else {**stacks, "cross": written}

    @property
    def attention_traits(self) -> AttentionTraits:
        return stack_traits(self.config.encoder, "encoder", dtype=self.dtype, causal=False)

    def embed_tokens(self, tokens: Array | HostArray) -> Array:
        x = _scaled(super().embed_tokens(tokens), self.config.encoder)
        if self.config.eoi < 0:
            return x
        return self._with_eoi(x, tokens, self.eoi_embedding.get_value())

    def embedding_table(self) -> Table:
        config = self.config
        table: Table = ScaledTable(
            table=self.token_embedder.table(), scale=config.embedding_scale, dtype=self.dtype
        )
        if config.eoi < 0:
            return table
        return _TableWithEoi(table=table, eoi=config.eoi, eoi_D=self.eoi_embedding.get_value())

    def read(
        self,
        source: ModelInput,
        *,
        injections: Injections = NO_INJECTIONS,
        key: Array | None = None,
        remat: Remat = "none",
    ) -> Context:
        source = joined(source)
        hidden_BUD, _ = self._encode(source, injections=injections, key=key, remat=remat)
        return Context(
            hidden_BUD=hidden_BUD,
            mask_BU=source.mask_BU,
            keys_values=self._cross_keys_values(hidden_BUD),
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
        start = ((0, 0), (1, 0))
        shifted_BS = jnp.pad(targets_BS, start, constant_values=self.token_ids.start)[:, :-1]
        x_BSD, _ = self._decode(
            shifted_BS,
            context.keys_values,
            context.mask_BU,
            injections=injections,
            key=key,
            remat=remat,
        )
        return x_BSD

    def decode_step(
        self,
        tokens_B: Array,
        position: Array | int,
        caches: tuple[KeyValues, ...],
        context: DecodeContext,
        *,
        injections: Injections = NO_INJECTIONS,
    ) -> tuple[Array, tuple[KeyValues, ...]]:
        x_B1D, caches = self._decode(
            tokens_B[:, None],
            context.keys_values,
            context.mask_BU,
            injections=injections,
            caches=caches,
            position=position,
        )
        return self.logits(x_B1D)[:, 0], caches

    def logits(self, hidden: Array) -> Array:
        return self.output_head().logits(hidden)

    def output_head(self) -> OutputHead:
        config = self.config
        return OutputHead(
            layer=self._head_embedder if config.tie_embeddings else self.decoder.logits_dense,
            vocab_size=config.vocab_size,
            cap=config.decoder.logits_softcap,
        )

    def output_vectors(self, tokens_N: Array | HostArray) -> Array:
        if self.config.tie_embeddings:
            return self._head_embedder.table()[tokens_N].astype(jnp.float32)
        return self.decoder.logits_dense.columns(tokens_N).T

    def keys_values_of(self, tokens_P: Array) -> dict[str, tuple[Array, Array]]:
        source = self.embed(tokens_P[None])
        hidden_1PD, read = self._encode(source)
        cross = self._cross_keys_values(hidden_1PD)
        _, written = self._decode(tokens_P[None], cross, source.mask_BU)
        by_stack = {"encoder": read, "decoder": written, "cross": cross}
        return {name: stacked(by_stack[name]) for name in self.stacks}

    @property
    def _head_embedder(self) -> Embed:
        return self.token_embedder if self.config.shares_table else self.decoder_embedder

    def _embed_targets(self, tokens_BS: Array | HostArray) -> Array:
        if self.config.shares_table:
            return self.embed_tokens(tokens_BS)
        tokens_BS = jnp.maximum(jnp.asarray(tokens_BS), 0)  # padding may be -1
        x_BSD = _scaled(self.decoder_embedder(tokens_BS), self.config.decoder)
        if self.config.eoi < 0:
            return x_BSD
        return self._with_eoi(x_BSD, tokens_BS, self.decoder_eoi_embedding.get_value())

    def _with_eoi(self, x: Array, tokens: Array | HostArray, eoi_D: Array) -> Array:
        """Puts the vector of T5Gemma 2's end of an image where this token is."""
        is_eoi = jnp.asarray(tokens) == self.config.eoi
        return jnp.where(is_eoi[..., None], eoi_D.astype(x.dtype), x)

    def _encode(
        self,
        source: ModelInput,
        *,
        injections: Injections = NO_INJECTIONS,
        key: Array | None = None,
        remat: Remat = "none",
    ) -> tuple[Array, tuple[KeyValues, ...]]:
        """Computes the encoder's output ``[B, U, D]``, and the keys and values of its layers."""
        keys = split_key(key, 3)
        past, start = self._prefix(injections, "encoder")
        x_BUD = dropout(source.embeddings_BUD, self.dropout_rate, key=keys[0], shared_axis=-2)
        x_BUD, computed = self.encoder(
            x_BUD,
            positions_in(source.mask_BU, start=start),
            past,
            mask_BT=source.mask_BU,
            mask_BTT=source.attention_mask_BUU,
            layer_prompts=injections.layer_prompts,
            key=keys[1],
            remat=remat,
            scan=self.scan_layers,
            attention=self.attention.implementation,
        )
        return dropout(x_BUD, self.dropout_rate, key=keys[2], shared_axis=-2), computed

    def _cross_keys_values(self, hidden_BUD: Array) -> tuple[KeyValues, ...]:
        """Computes what each decoder layer attends to in the encoder's output."""
        layers = [self.decoder.layer(i) for i in range(self.config.decoder.num_layers)]
        merged = self.config.merged
        return tuple(
            # The keys have norms, but no positions.
            (layer.self_attention if merged else layer.encoder_decoder_attention).keys_values(
                hidden_BUD, None
            )
            for layer in layers
        )

    def _decode(
        self,
        tokens_BS: Array | HostArray,
        cross: tuple[KeyValues, ...],
        mask_BU: Array,
        *,
        injections: Injections = NO_INJECTIONS,
        key: Array | None = None,
        remat: Remat = "none",
        caches: tuple[KeyValues, ...] | None = None,
        position: Array | int = 0,
    ) -> tuple[Array, tuple[KeyValues, ...]]:
        """Computes the decoder's output ``[B, S, D]``, and the keys and values of its layers.

        With caches, ``tokens_BS`` has only the token at ``position``.
        """
        keys = split_key(key, 3)
        past, start = self._prefix(injections, "decoder")
        read = PastKeys(layers=cross, positions_BU=None, mask_BU=mask_BU)
        across: Sequence[PastKeys] = ()
        if self.config.merged:
            past = [*past, read]
        else:
            across = [*self._prefix(injections, "cross")[0], read]
        x_BSD = self._embed_targets(tokens_BS)
        x_BSD = dropout(x_BSD, self.dropout_rate, key=keys[0], shared_axis=-2)
        x_BSD, computed = self.decoder(
            x_BSD,
            consecutive(start + position, x_BSD.shape[1]),
            past,
            cross=across,
            caches=caches,
            slot=position,
            key=keys[1],
            remat=remat,
            scan=self.scan_layers,
        )
        return dropout(x_BSD, self.dropout_rate, key=keys[2], shared_axis=-2), computed

    def _prefix(self, injections: Injections, stack: str) -> tuple[list[PastKeys], int]:
        """Returns the prefix of a stack's layers, and the position of the first token behind it."""
        prefixes = tuple(injections.prefixes.get(stack, ()))
        layers = jax.tree.map(lambda x: x.astype(self.dtype), prefixes)
        if not layers:
            return [], 0
        if layers[0].before:
            return [past_keys(layers)], num_positions(layers)
        return [PastKeys(layers=layers, positions_BU=None)], 0


@dataclass(frozen=True, kw_only=True)
class _TableWithEoi:
    """An embedding table in which one token has another vector."""

    table: Table
    eoi: int
    eoi_D: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.table.shape

    def __getitem__(self, ids: Any) -> Array:
        rows = self.table[ids]
        number = jnp.arange(self.shape[0])[ids]
        return jnp.where((number == self.eoi)[..., None], self.eoi_D.astype(rows.dtype), rows)


def _scaled(x: Array, stack: CausalLMConfig) -> Array:
    # Gemma rounds the factor to the dtype of the activations, and so does transformers.
    return x * jnp.asarray(stack.embedding_scale, x.dtype)
