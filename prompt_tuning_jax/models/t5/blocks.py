"""Encoder and decoder layers, and rematerialisation for the backward pass."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
from flax import nnx

from prompt_tuning_jax.models.injections import KeyValues
from prompt_tuning_jax.models.layers import LINEAR, Mlp, RMSNorm, dropout, split_key
from prompt_tuning_jax.models.t5.attention import (
    Attention,
    RelativePositionBias,
    SelfCache,
    pad_in_front,
)
from prompt_tuning_jax.models.t5.config import T5Config
from prompt_tuning_jax.typing import Array, DType

# What each layer stores for the backward pass.  "none" stores everything; "dots" stores the outputs
# of linear maps and recomputes the rest, mainly attention scores; "full" stores only the input.
Remat: TypeAlias = Literal["none", "dots", "full"]


def rematerialised(layer: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """Wraps a layer so that it stores for its backward pass only what ``remat`` specifies."""
    if remat == "none":
        return layer
    policies = jax.checkpoint_policies
    kept = policies.save_only_these_names(LINEAR) if remat == "dots" else policies.nothing_saveable
    checkpointed: Callable[..., Any] = jax.checkpoint(layer, policy=kept)
    return checkpointed


class EncoderLayer(nnx.Module):
    """Self-attention and mlp, each with a pre-norm and a residual connection."""

    def __init__(self, config: T5Config, **kwargs: Any):
        norm = {"dtype": kwargs["dtype"], "param_dtype": kwargs["param_dtype"]}
        if config.relpos_per_layer:
            self.relpos_bias = relpos_bias(config, bidirectional=True, **kwargs)
        self.pre_attention_layer_norm = RMSNorm(config, **norm)
        self.attention = Attention(config, **kwargs)
        self.pre_mlp_layer_norm = RMSNorm(config, **norm)
        self.mlp = Mlp(config, **kwargs)
        self.dropout_rate: float = kwargs["dropout_rate"]

    def __call__(
        self,
        x_BUD: Array,
        position_bias_1HUU: Array,
        mask_bias_B1UU: Array,
        prefix: KeyValues | None,
        key: Array | None,
    ) -> Array:
        keys = split_key(key, 4)
        y_BUD = self.pre_attention_layer_norm(x_BUD)
        kv = self.attention.keys_values(y_BUD)
        # Add here: the sum is as large as the scores and need not be stored between layers.
        length = position_bias_1HUU.shape[-1]
        bias_BHUU = position_bias_1HUU + pad_in_front(mask_bias_B1UU, to=length)
        y_BUD = self.attention(y_BUD, kv, bias_BHUU, prefix=prefix, key=keys[0])
        x_BUD = x_BUD + dropout(y_BUD, self.dropout_rate, key=keys[1], shared_axis=-2)
        y_BUD = self.mlp(self.pre_mlp_layer_norm(x_BUD), key=keys[2])
        return x_BUD + dropout(y_BUD, self.dropout_rate, key=keys[3], shared_axis=-2)


class DecoderLayer(nnx.Module):
    """Causal self-attention, cross-attention and mlp, each with a pre-norm and a residual."""

    def __init__(self, config: T5Config, **kwargs: Any):
        norm = {"dtype": kwargs["dtype"], "param_dtype": kwargs["param_dtype"]}
        if config.relpos_per_layer:
            self.relpos_bias = relpos_bias(config, bidirectional=False, **kwargs)
        self.pre_self_attention_layer_norm = RMSNorm(config, **norm)
        self.self_attention = Attention(config, **kwargs)
        self.pre_cross_attention_layer_norm = RMSNorm(config, **norm)
        self.encoder_decoder_attention = Attention(config, **kwargs)
        self.pre_mlp_layer_norm = RMSNorm(config, **norm)
        self.mlp = Mlp(config, **kwargs)
        self.dropout_rate: float = kwargs["dropout_rate"]

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
        cache: SelfCache | None = None,
        position: Array | int = 0,
    ) -> tuple[Array, SelfCache | None]:
        """Applies the layer and returns its output and the updated cache.

        With a cache, ``x_BSD`` holds only the token at ``position``.  Its keys and values are added
        to those of the positions decoded before.
        """
        keys = split_key(key, 6)
        y_BSD = self.pre_self_attention_layer_norm(x_BSD)
        kv = self.self_attention.keys_values(y_BSD)
        if cache is not None:
            cache = SelfCache(
                key_BSHK=_write(cache.key_BSHK, kv.key_BPHK, position),
                value_BSHK=_write(cache.value_BSHK, kv.value_BPHK, position),
            )
            kv = KeyValues(key_BPHK=cache.key_BSHK, value_BPHK=cache.value_BSHK)
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


def relpos_bias(
    config: T5Config, *, bidirectional: bool, param_dtype: DType, rngs: nnx.Rngs, **_: Any
) -> RelativePositionBias:
    """Creates the relative position bias of a stack or of a single layer."""
    return RelativePositionBias(
        config, bidirectional=bidirectional, param_dtype=param_dtype, rngs=rngs
    )


def _write(cache_BSHK: Array, new_B1HK: Array, position: Array | int) -> Array:
    start = (0, position, 0, 0)
    return jax.lax.dynamic_update_slice(cache_BSHK, new_B1HK.astype(cache_BSHK.dtype), start)
