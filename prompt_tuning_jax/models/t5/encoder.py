"""The encoder of T5, which reads the prompt and the input."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax.models.embedding_uses import EmbeddingUse
from prompt_tuning_jax.models.injections import Injections, KeyValues, ModelInput
from prompt_tuning_jax.models.layer_loop import run_layers
from prompt_tuning_jax.models.layers import Mlp, Remat, dropout, split_key
from prompt_tuning_jax.models.ops import fused_tiles
from prompt_tuning_jax.models.t5.attention import (
    Attention,
    FusedBias,
    RelativePositionBias,
    bias_of,
    make_norm,
    pad_in_front,
    positions_before,
    with_positions_before,
)
from prompt_tuning_jax.models.t5.config import T5Config
from prompt_tuning_jax.typing import Array, DType


class EncoderLayer(nnx.Module):
    """Self-attention and mlp, each with a pre-norm and a residual connection."""

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
                config, bidirectional=True, param_dtype=param_dtype, rngs=rngs
            )
        self.pre_attention_layer_norm = make_norm(config, dtype=dtype, param_dtype=param_dtype)
        self.attention = Attention(
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
        x_BUD: Array,
        bias: Array | FusedBias,
        mask_bias_B1UU: Array,
        prefix: KeyValues | None,
        key: Array | None,
    ) -> tuple[Array, KeyValues]:
        """Applies the layer and returns its output with the keys and values of its positions."""
        keys = split_key(key, 4)
        y_BUD = self.pre_attention_layer_norm(x_BUD)
        kv = self.attention.keys_values(y_BUD)
        if not isinstance(bias, FusedBias):
            # Add here: the sum is as large as the scores and need not be stored between layers.
            bias = bias + pad_in_front(mask_bias_B1UU, to=bias.shape[-1])
        y_BUD = self.attention(y_BUD, kv, bias, prefix=prefix, key=keys[0])
        x_BUD = x_BUD + dropout(y_BUD, self.dropout_rate, key=keys[1], shared_axis=-2)
        y_BUD = self.mlp(self.pre_mlp_layer_norm(x_BUD), key=keys[2])
        return x_BUD + dropout(y_BUD, self.dropout_rate, key=keys[3], shared_axis=-2), kv


class Encoder(nnx.Module):
    """The encoder stack, which reads the prompt and the input."""

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
                config, bidirectional=True, param_dtype=param_dtype, rngs=rngs
            )
        self.num_layers, self.head_dim = config.num_encoder_layers, config.head_dim
        self.dtype = dtype
        for i in range(self.num_layers):
            setattr(
                self,
                f"layers_{i}",
                EncoderLayer(
                    config,
                    dtype=dtype,
                    param_dtype=param_dtype,
                    dropout_rate=dropout_rate,
                    rngs=rngs,
                ),
            )
        self.encoder_norm = make_norm(config, dtype=dtype, param_dtype=param_dtype)
        self.embed_tokens = EmbeddingUse()
        self.dropout_rate = dropout_rate

    def layer(self, i: int) -> EncoderLayer:
        """Returns layer ``i``, from 0."""
        return getattr(self, f"layers_{i}")

    def __call__(
        self,
        source: ModelInput,
        *,
        injections: Injections,
        key: Array | None,
        remat: Remat = "none",
        scan: bool = False,
        fuse: bool = False,
        returns_keys_values: bool = False,
    ) -> tuple[Array, list[KeyValues | None]]:
        """Encodes an input that its prompt is part of.

        Returns ``[B, U, D]``, and for each layer, if asked, the keys and values of these positions.
        """
        keys = split_key(key, self.num_layers + 2)
        x_BUD, mask_BU = source.embeddings_BUD, source.mask_BU
        positions_U = jnp.arange(x_BUD.shape[1])
        visible_BUU = mask_BU[:, None, :]
        if source.attention_mask_BUU is not None:
            visible_BUU = visible_BUU & source.attention_mask_BUU
        mask_B1UU = bias_of(visible_BUU)
        prefixes = injections.prefixes.get("encoder", (None,) * self.num_layers)
        befores = {positions_before(prefix) for prefix in prefixes}
        fuses = (
            fuse
            and source.attention_mask_BUU is None
            and fused_tiles.fits(
                len(positions_U),
                len(positions_U) + max(befores),
                width=self.head_dim,
                dtype=self.dtype,
                maps=True,
            )
            # The kernel has a bias for each distance, and a prefix without positions has none.
            and all(prefix is None or prefix.before for prefix in prefixes)
        )

        def bias_of_layer(of: RelativePositionBias, before: int) -> Array | FusedBias:
            if not fuses:
                return of(positions_U, with_positions_before(positions_U, before))
            distances_N = jnp.arange(1 - len(positions_U), len(positions_U) + before) - before
            seen_BU = jnp.pad(mask_BU, ((0, 0), (before, 0)), constant_values=True)
            seen = fused_tiles.visible_keys(seen_BU, length=len(positions_U))
            return FusedBias(bias_HN=of.at(distances_N), seen=seen)

        shared = {}
        if not self.relpos_per_layer:
            shared = {before: bias_of_layer(self.relpos_bias, before) for before in befores}
        x_BUD = dropout(x_BUD, self.dropout_rate, key=keys[-1], shared_axis=-2)

        def apply(layer: EncoderLayer, x_BUD: Array, given: Any, _: None) -> Any:
            prompt, prefix, layer_key = given
            x_BUD = prompt.put_into(x_BUD) if prompt else x_BUD
            before = positions_before(prefix)
            bias = shared.get(before)
            if bias is None:
                bias = bias_of_layer(layer.relpos_bias, before)
            x_BUD, keys_values = layer(x_BUD, bias, mask_B1UU, prefix, layer_key)
            return x_BUD, keys_values if returns_keys_values else None

        no_prompts = (None,) * self.num_layers
        x_BUD, keys_values = run_layers(
            [self.layer(i) for i in range(self.num_layers)],
            apply,
            x_BUD,
            list(
                zip(
                    injections.layer_prompts or no_prompts,
                    prefixes,
                    keys[: self.num_layers],
                    strict=True,
                )
            ),
            remat=remat,
            scan=scan,
        )
        x_BUD = self.encoder_norm(x_BUD)
        return dropout(x_BUD, self.dropout_rate, key=keys[-2], shared_axis=-2), keys_values
