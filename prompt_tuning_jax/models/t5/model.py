"""The T5 model and its forward pass (Raffel et al. 2020; t5x/examples/t5/network.py)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.injections import NO_INJECTIONS, EncoderInput, Injections, KeyValues
from prompt_tuning_jax.models.layers import Embed, Linear, RMSNorm, dropout, split_key
from prompt_tuning_jax.models.t5.attention import SelfCache, bias_of
from prompt_tuning_jax.models.t5.blocks import (
    DecoderLayer,
    EncoderLayer,
    Remat,
    relpos_bias,
    rematerialised,
)
from prompt_tuning_jax.models.t5.config import T5Config, TokenIds
from prompt_tuning_jax.typing import Array, DType, HostArray


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Encoded:
    """The encoder's output ``[B, U, D]`` and the mask ``[B, U]`` of its real positions."""

    hidden_BUD: Array
    mask_BU: Array


class Encoder(nnx.Module):
    """The encoder stack, which reads the prompt and the input."""

    def __init__(self, config: T5Config, **kwargs: Any):
        self.relpos_per_layer = config.relpos_per_layer
        if not self.relpos_per_layer:
            self.relpos_bias = relpos_bias(config, bidirectional=True, **kwargs)
        self.num_layers = config.num_encoder_layers
        for i in range(self.num_layers):
            setattr(self, f"layers_{i}", EncoderLayer(config, **kwargs))
        norm = {"dtype": kwargs["dtype"], "param_dtype": kwargs["param_dtype"]}
        self.encoder_norm = RMSNorm(config, **norm)
        self.dropout_rate: float = kwargs["dropout_rate"]

    def layer(self, i: int) -> EncoderLayer:
        """Layer ``i``, from 0."""
        return getattr(self, f"layers_{i}")

    def __call__(
        self,
        source: EncoderInput,
        *,
        injections: Injections,
        key: Array | None,
        remat: Remat = "none",
    ) -> Encoded:
        keys = split_key(key, self.num_layers + 2)
        x_BUD, mask_BU = source.embeddings_BUD, source.mask_BU
        positions_U = jnp.arange(x_BUD.shape[1])
        visible_BUU = mask_BU[:, None, :]
        if source.attention_mask_BUU is not None:
            visible_BUU = visible_BUU & source.attention_mask_BUU
        mask_B1UU = bias_of(visible_BUU)
        prefixes = injections.encoder_prefixes or (None,) * self.num_layers
        biases = _position_biases(self, positions_U, positions_U, prefixes)
        x_BUD = dropout(x_BUD, self.dropout_rate, key=keys[-1], shared_axis=-2)
        for i, bias in enumerate(biases):
            prompt = injections.layer_prompts[i] if injections.layer_prompts else None
            x_BUD = prompt.put_into(x_BUD) if prompt else x_BUD
            layer = rematerialised(self.layer(i), remat)
            x_BUD = layer(x_BUD, bias, mask_B1UU, prefixes[i], keys[i])
        x_BUD = self.encoder_norm(x_BUD)
        x_BUD = dropout(x_BUD, self.dropout_rate, key=keys[-2], shared_axis=-2)
        return Encoded(hidden_BUD=x_BUD, mask_BU=mask_BU)


class Decoder(nnx.Module):
    """The decoder stack, which sees the prompt only through the encoder's output."""

    def __init__(self, config: T5Config, **kwargs: Any):
        dtype, param_dtype, rngs = kwargs["dtype"], kwargs["param_dtype"], kwargs["rngs"]
        self.relpos_per_layer = config.relpos_per_layer
        if not self.relpos_per_layer:
            self.relpos_bias = relpos_bias(config, bidirectional=False, **kwargs)
        self.num_layers = config.num_decoder_layers
        for i in range(self.num_layers):
            setattr(self, f"layers_{i}", DecoderLayer(config, **kwargs))
        self.decoder_norm = RMSNorm(config, dtype=dtype, param_dtype=param_dtype)
        self.dropout_rate: float = kwargs["dropout_rate"]
        if not config.tie_embeddings:
            self.logits_dense = Linear(
                config.embed_dim,
                config.vocab_size,
                axes=("embed", "vocab"),
                std=config.embed_dim**-0.5,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
                out_dtype=jnp.float32,
            )

    def layer(self, i: int) -> DecoderLayer:
        """Layer ``i``, from 0."""
        return getattr(self, f"layers_{i}")

    def cross_keys(self, encoded: Encoded) -> tuple[KeyValues, ...]:
        """Computes the cross-attention keys and values of each layer, once per encoded batch."""
        return tuple(
            self.layer(i).encoder_decoder_attention.keys_values(encoded.hidden_BUD)
            for i in range(self.num_layers)
        )

    def __call__(
        self,
        x_BSD: Array,
        cross: tuple[KeyValues, ...],
        encoder_mask_BU: Array,
        *,
        injections: Injections,
        key: Array | None,
        remat: Remat = "none",
        caches: tuple[SelfCache, ...] | None = None,
        position: Array | int = 0,
    ) -> tuple[Array, tuple[SelfCache, ...] | None]:
        keys = split_key(key, self.num_layers + 2)
        query_positions = jnp.arange(x_BSD.shape[1]) + position
        length = x_BSD.shape[1] if caches is None else caches[0].key_BSHK.shape[1]
        key_positions = jnp.arange(length)
        causal_1SS = (key_positions[None, :] <= query_positions[:, None])[None]
        mask_11SS = bias_of(causal_1SS)
        prefixes = injections.decoder_prefixes or (None,) * self.num_layers
        biases = _position_biases(self, query_positions, key_positions, prefixes)
        cross_bias = bias_of(encoder_mask_BU[:, None, :])
        x_BSD = dropout(x_BSD, self.dropout_rate, key=keys[-1], shared_axis=-2)
        new_caches = []
        for i, bias in enumerate(biases):
            x_BSD, cache = rematerialised(self.layer(i), remat)(
                x_BSD,
                cross[i],
                bias,
                mask_11SS,
                cross_bias,
                prefixes[i],
                injections.cross_prefixes[i] if injections.cross_prefixes else None,
                keys[i],
                None if caches is None else caches[i],
                position,
            )
            new_caches.append(cache)
        x_BSD = self.decoder_norm(x_BSD)
        x_BSD = dropout(x_BSD, self.dropout_rate, key=keys[-2], shared_axis=-2)
        return x_BSD, None if caches is None else tuple(c for c in new_caches if c is not None)


class T5(nnx.Module):
    """A T5 1.0 or 1.1 encoder-decoder that accepts a prompt per example.

    Parameters have the same names and layout as in T5X.  ``dtype`` is the dtype of activations and
    matrix operands, and ``param_dtype`` is the dtype of the weights.  Norms, softmaxes and logits
    are computed in float32.  Token arrays are padded with ``token_ids.fill`` (0 unless the model
    has a different padding id), and the decoder starts from ``token_ids.start``.
    """

    def __init__(
        self,
        config: T5Config,
        *,
        rngs: nnx.Rngs,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
        dropout_rate: float = 0.0,
        vocabulary: Any = None,
    ):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.token_embedder = Embed(config, **kwargs)
        self.encoder = Encoder(config, dropout_rate=dropout_rate, **kwargs)
        self.decoder = Decoder(config, dropout_rate=dropout_rate, **kwargs)
        self.config = config
        self.dtype = dtype
        self.vocabulary = vocabulary
        self.original_fingerprint = ""  # fingerprint of the weights before quantisation

    def __repr__(self) -> str:
        """Describes the model's sizes without adapters; ``nnx.display`` shows every array."""
        config = self.config
        params = param_tree.split(self)[1]
        arrays = [array for name, array in params.items() if "/adapter/" not in name]
        number, size = sum(a.size for a in arrays), sum(a.nbytes for a in arrays)
        kinds = ", ".join(sorted({a.dtype.name for a in arrays}))
        return (
            f"{type(self).__name__}({config.num_encoder_layers} + {config.num_decoder_layers} "
            f"layers, embed_dim={config.embed_dim}, num_heads={config.num_heads}, "
            f"mlp_dim={config.mlp_dim}, vocab_size={config.vocab_size}: {number:,} parameters in "
            f"{kinds}, {size / 1e6:,.1f} MB)"
        )

    def __call__(
        self,
        encoder_input_tokens: Array | HostArray,
        decoder_input_tokens: Array | HostArray,
        prompt: Array | None = None,
        *,
        injections: Injections = NO_INJECTIONS,
        key: Array | None = None,
        remat: Remat = "none",
    ) -> Array:
        """Computes logits ``[B, S, V]`` in float32; passing a ``key`` enables dropout."""
        keys = split_key(key, 2)
        encoded = self.encode(
            encoder_input_tokens, prompt, injections=injections, key=keys[0], remat=remat
        )
        return self.decode(
            decoder_input_tokens, encoded, injections=injections, key=keys[1], remat=remat
        )

    @property
    def token_ids(self) -> TokenIds:
        """The model's padding, end-of-sequence and start ids."""
        return self.config.token_ids

    @property
    def input_eos(self) -> int:
        """The id that ends an input: the vocabulary's, or the model's if there is no vocabulary."""
        return self.token_ids.eos if self.vocabulary is None else int(self.vocabulary.eos_id)

    def embed_tokens(self, tokens: Array | HostArray) -> Array:
        """Embeds token ids, ``[...] -> [..., D]``; values at padding are meaningless."""
        if self.token_ids.fill < 0:
            tokens = jnp.maximum(jnp.asarray(tokens), 0)
        return self.token_embedder(tokens)

    def embed(self, tokens_BT: Array | HostArray, prompt: Array | None = None) -> EncoderInput:
        """Embeds tokens, prepends a prompt ``[P, D]`` or ``[B, P, D]``, and adds the mask."""
        source = EncoderInput(
            embeddings_BUD=self.embed_tokens(tokens_BT), mask_BU=tokens_BT != self.token_ids.fill
        )
        return source if prompt is None else prepend(prompt, source)

    def encode(
        self,
        tokens_BT: Array | HostArray,
        prompt: Array | None = None,
        *,
        injections: Injections = NO_INJECTIONS,
        key: Array | None = None,
        remat: Remat = "none",
    ) -> Encoded:
        """Encodes the prompt and the tokens, or ``injections.encoder_input`` if it is given."""
        source = injections.encoder_input
        if source is None:
            source = self.embed(tokens_BT, prompt)
        return self.encoder(source, injections=injections, key=key, remat=remat)

    def decode(
        self,
        tokens_BS: Array | HostArray,
        encoded: Encoded,
        *,
        injections: Injections = NO_INJECTIONS,
        key: Array | None = None,
        remat: Remat = "none",
    ) -> Array:
        """Computes logits ``[B, S, V]`` for all positions at once (teacher forcing)."""
        hidden_BSD = self.decode_hidden(
            tokens_BS, encoded, injections=injections, key=key, remat=remat
        )
        return self.logits(hidden_BSD)

    def decode_hidden(
        self,
        tokens_BS: Array | HostArray,
        encoded: Encoded,
        *,
        injections: Injections = NO_INJECTIONS,
        key: Array | None = None,
        remat: Remat = "none",
    ) -> Array:
        """Computes the input of the output head, ``[B, S, D]``."""
        cross = self.decoder.cross_keys(encoded)
        embedded_BSD = self.embed_tokens(tokens_BS)
        x_BSD, _ = self.decoder(
            embedded_BSD, cross, encoded.mask_BU, injections=injections, key=key, remat=remat
        )
        return x_BSD

    def start_decoding(
        self, encoded: Encoded, max_length: int
    ) -> tuple[tuple[KeyValues, ...], tuple[SelfCache, ...]]:
        """Prepares step-by-step decoding.

        Returns the cross-attention keys and values, and empty self-attention caches for
        ``max_length`` positions.
        """
        batch = encoded.hidden_BUD.shape[0]
        shape = (batch, max_length, self.config.num_heads, self.config.head_dim)
        empty = SelfCache(
            key_BSHK=jnp.zeros(shape, self.dtype), value_BSHK=jnp.zeros(shape, self.dtype)
        )
        return self.decoder.cross_keys(encoded), (empty,) * self.config.num_decoder_layers

    def decode_step(
        self,
        tokens_B: Array,
        position: Array | int,
        caches: tuple[SelfCache, ...],
        cross: tuple[KeyValues, ...],
        encoder_mask_BU: Array,
        *,
        injections: Injections = NO_INJECTIONS,
    ) -> tuple[Array, tuple[SelfCache, ...]]:
        """Decodes the token at ``position``; returns logits ``[B, V]`` and the updated caches.

        The logits predict the next token, and the caches include ``position``.
        """
        embedded_B1D = self.embed_tokens(tokens_B[:, None])
        x_B1D, new = self.decoder(
            embedded_B1D,
            cross,
            encoder_mask_BU,
            injections=injections,
            key=None,
            caches=caches,
            position=position,
        )
        assert new is not None
        return self.logits(x_B1D)[:, 0], new

    def logits(self, x_BSD: Array) -> Array:
        """Applies the output head; returns logits in float32."""
        if self.config.tie_embeddings:
            return self.token_embedder.attend(x_BSD * self.config.embed_dim**-0.5)
        return self.decoder.logits_dense(x_BSD)

    def output_vectors(self, tokens_N: Array | HostArray) -> Array:
        """Returns the output head's weight vectors ``[N, D]`` of these tokens, in float32."""
        if self.config.tie_embeddings:
            rows_ND = self.token_embedder.table()[tokens_N].astype(jnp.float32)
            return rows_ND * self.config.embed_dim**-0.5
        return self.decoder.logits_dense.columns(tokens_N).T


def prepend(prompt: Array, source: EncoderInput) -> EncoderInput:
    """Prepends a prompt ``[P, D]``, or one per example ``[B, P, D]``, to the embedded input.

    All positions see the prompt, and the prompt sees all positions (Lester et al. 2021, section 2).
    Raises UserError if the prompt has another number of dimensions or another width.
    """
    batch, _, width = source.embeddings_BUD.shape
    if prompt.ndim not in (2, 3) or prompt.shape[-1] != width:
        raise UserError(
            f"a prompt for this model has shape [P, {width}] or [{batch}, P, {width}]; "
            f"got {list(prompt.shape)}"
        )
    prompt_BPD = jnp.broadcast_to(prompt, (batch, *prompt.shape[-2:]))
    prompt_BPD = prompt_BPD.astype(source.embeddings_BUD.dtype)
    seen_BP = jnp.ones(prompt_BPD.shape[:2], bool)
    return EncoderInput(
        embeddings_BUD=jnp.concatenate([prompt_BPD, source.embeddings_BUD], axis=1),
        mask_BU=jnp.concatenate([seen_BP, source.mask_BU], axis=1),
    )


def _position_biases(
    stack: Encoder | Decoder,
    query_positions: Array,
    key_positions: Array,
    prefixes: Sequence[KeyValues | None],
) -> Iterator[Array]:
    """Yields the relative position bias of each layer's self-attention."""
    shared = None
    for i, prefix in enumerate(prefixes):
        ahead = prefix.key_BPHK.shape[1] if prefix and prefix.before else 0
        if (
            stack.relpos_per_layer
            or shared is None
            or shared.shape[-1] != ahead + len(key_positions)
        ):
            # Yield one at a time: with a bias per layer, only that layer needs it.
            of = stack.layer(i) if stack.relpos_per_layer else stack
            before = jnp.arange(-ahead, 0)
            positions = jnp.concatenate([before, key_positions]) if ahead else key_positions
            shared = of.relpos_bias(query_positions, positions)
        yield shared
