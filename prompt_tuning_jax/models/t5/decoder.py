"""The decoder of T5, which attends to the encoder's output."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax.models.embedding_uses import EmbeddingUse, TiedHead
from prompt_tuning_jax.models.injections import Injections, KeyValues
from prompt_tuning_jax.models.layer_loop import run_layers
from prompt_tuning_jax.models.layers import Mlp, Remat, dropout, make_head, split_key
from prompt_tuning_jax.models.t5.attention import (
    Attention,
    RelativePositionBias,
    bias_of,
    make_norm,
    pad_in_front,
    positions_before,
    with_positions_before,
)
from prompt_tuning_jax.models.t5.config import T5Config
from prompt_tuning_jax.typing import Array, DType


class DecoderLayer(nnx.Module):
    """Causal self-attention, cross-attention and mlp, each with a pre-norm and a residual."""

    def __init__(
        self,
        config: T5Config,
        *,
        dtype: DType,
        param_dtype: DType,
        dropout_rate: float,
        rngs: nnx.Rngs,
    ):
        if config.relpos_per_layer:
            self.relpos_bias = RelativePositionBias(
                config, bidirectional=False, param_dtype=param_dtype, rngs=rngs
            )
        self.pre_self_attention_layer_norm = make_norm(config, dtype=dtype, param_dtype=param_dtype)
        self.self_attention = Attention(
            config, dtype=dtype, param_dtype=param_dtype, dropout_rate=dropout_rate, rngs=rngs
        )
        self.pre_cross_attention_layer_norm = make_norm(
            config, dtype=dtype, param_dtype=param_dtype
        )
        self.encoder_decoder_attention = Attention(
            config, dtype=dtype, param_dtype=param_dtype, dropout_rate=dropout_rate, rngs=rngs
        )
        self.pre_mlp_layer_norm = make_norm(config, dtype=dtype, param_dtype=param_dtype)
        self.mlp = Mlp(
            config,
            config.mlp_activations,
            dtype=dtype,
            param_dtype=param_dtype,
            dropout_rate=dropout_rate,
            rngs=rngs,
        )
        self.dropout_rate = dropout_rate

    def __call__(
        self,
        x_BSD: Array,
        cross: KeyValues,
        position_bias_1HSS: Array,
        mask_bias_11SS: Array,
        cross_bias_B11U: Array,
        prefix: KeyValues | None,
        cross_prefix: KeyValues | None,
        key: Array | None,
        cache: KeyValues | None = None,
        position: Array | int = 0,
    ) -> tuple[Array, KeyValues | None]:
        """Applies the layer and returns its output and the updated cache.

        With a cache, ``x_BSD`` holds only what begins at ``position``.  Its keys and values are
        written behind those of the positions decoded before.
        """
        keys = split_key(key, 6)
        y_BSD = self.pre_self_attention_layer_norm(x_BSD)
        kv = self.self_attention.keys_values(y_BSD)
        if cache is not None:
            kv = cache = cache.written(kv, position)
        length = position_bias_1HSS.shape[-1]
        bias_1HSS = position_bias_1HSS + pad_in_front(mask_bias_11SS, to=length)
        y_BSD = self.self_attention(y_BSD, kv, bias_1HSS, prefix=prefix, key=keys[0])
        x_BSD = x_BSD + dropout(y_BSD, self.dropout_rate, key=keys[1], shared_axis=-2)
        y_BSD = self.pre_cross_attention_layer_norm(x_BSD)
        y_BSD = self.encoder_decoder_attention(
            y_BSD, cross, cross_bias_B11U, prefix=cross_prefix, key=keys[2]
        )
        x_BSD = x_BSD + dropout(y_BSD, self.dropout_rate, key=keys[3], shared_axis=-2)
        y_BSD = self.mlp(self.pre_mlp_layer_norm(x_BSD), key=keys[4])
        return x_BSD + dropout(y_BSD, self.dropout_rate, key=keys[5], shared_axis=-2), cache


class Decoder(nnx.Module):
    """The decoder stack, which sees the encoder's prompt only through the encoder's output."""

    def __init__(
        self,
        config: T5Config,
        *,
        dtype: DType,
        param_dtype: DType,
        dropout_rate: float,
        rngs: nnx.Rngs,
    ):
        self.relpos_per_layer = config.relpos_per_layer
        if not self.relpos_per_layer:
            self.relpos_bias = RelativePositionBias(
                config, bidirectional=False, param_dtype=param_dtype, rngs=rngs
            )
        self.num_layers = config.num_decoder_layers
        for i in range(self.num_layers):
            setattr(
                self,
                f"layers_{i}",
                DecoderLayer(
                    config,
                    dtype=dtype,
                    param_dtype=param_dtype,
                    dropout_rate=dropout_rate,
                    rngs=rngs,
                ),
            )
        self.decoder_norm = make_norm(config, dtype=dtype, param_dtype=param_dtype)
        self.embed_tokens = EmbeddingUse()
        self.dropout_rate = dropout_rate
        if config.tie_embeddings:
            self.tied_logits = TiedHead()
        else:
            self.logits_dense = make_head(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def layer(self, i: int) -> DecoderLayer:
        """Returns layer ``i``, from 0."""
        return getattr(self, f"layers_{i}")

    def cross_keys_values(self, encoded_BUD: Array) -> tuple[KeyValues, ...]:
        """Computes the cross-attention keys and values of each layer, once per encoded batch."""
        return tuple(
            self.layer(i).encoder_decoder_attention.keys_values(encoded_BUD)
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
        scan: bool = False,
        caches: tuple[KeyValues, ...] | None = None,
        position: Array | int = 0,
    ) -> tuple[Array, tuple[KeyValues, ...] | None]:
        keys = split_key(key, self.num_layers + 2)
        query_positions = jnp.arange(x_BSD.shape[1]) + position
        length = x_BSD.shape[1] if caches is None else caches[0].key_BPGK.shape[1]
        key_positions = jnp.arange(length)
        causal_1SS = (key_positions[None, :] <= query_positions[:, None])[None]
        mask_11SS = bias_of(causal_1SS)
        prefixes = injections.prefixes.get("decoder", (None,) * self.num_layers)
        cross_prefixes = injections.prefixes.get("cross", (None,) * self.num_layers)

        def bias_of_layer(of: RelativePositionBias, before: int) -> Array:
            return of(query_positions, with_positions_before(key_positions, before))

        shared = {}
        if not self.relpos_per_layer:
            befores = {positions_before(prefix) for prefix in prefixes}
            shared = {before: bias_of_layer(self.relpos_bias, before) for before in befores}
        cross_bias = bias_of(encoder_mask_BU[:, None, :])
        x_BSD = dropout(x_BSD, self.dropout_rate, key=keys[-1], shared_axis=-2)

        def apply(
            layer: DecoderLayer, x_BSD: Array, given: Any, _: None
        ) -> tuple[Array, KeyValues | None]:
            cross, prefix, cross_prefix, layer_key, cache = given
            before = positions_before(prefix)
            bias = shared.get(before)
            if bias is None:
                bias = bias_of_layer(layer.relpos_bias, before)
            return layer(
                x_BSD,
                cross,
                bias,
                mask_11SS,
                cross_bias,
                prefix,
                cross_prefix,
                layer_key,
                cache,
                position,
            )

        no_caches = (None,) * self.num_layers
        x_BSD, new_caches = run_layers(
            [self.layer(i) for i in range(self.num_layers)],
            apply,
            x_BSD,
            list(
                zip(
                    cross,
                    prefixes,
                    cross_prefixes,
                    keys[: self.num_layers],
                    caches or no_caches,
                    strict=True,
                )
            ),
            remat=remat,
            scan=scan,
        )
        x_BSD = self.decoder_norm(x_BSD)
        x_BSD = dropout(x_BSD, self.dropout_rate, key=keys[-2], shared_axis=-2)
        return x_BSD, None if caches is None else tuple(c for c in new_caches if c is not None)
