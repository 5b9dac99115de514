"""Attention with grouped keys and values, over several segments of keys."""

import math
from collections.abc import Sequence
from functools import reduce
from typing import Protocol

import jax.numpy as jnp
import numpy as np
from flax import nnx

from prompt_tuning_jax.distributed.sharding import with_logical_constraint
from prompt_tuning_jax.models.causal_lm.config import CausalLMConfig
from prompt_tuning_jax.models.causal_lm.rope import Rotation, rotate
from prompt_tuning_jax.models.causal_lm.whole_attention import Whole, attend_at_once
from prompt_tuning_jax.models.injections import KeyValues
from prompt_tuning_jax.models.layers import Linear, RMSNorm, softcap, split_key
from prompt_tuning_jax.models.ops import matmul
from prompt_tuning_jax.models.ops.attention import MASK_VALUE, dropout_weights
from prompt_tuning_jax.typing import Array, DType, HostArray


class AttentionAdapter(Protocol):
    """What a method adds to an attention between the mixture of values and the output map.

    It receives the scaled queries, the values that they mixed, and the attention, and returns the
    attention's output ``[B, T, D]``.  Instances are modules, and their parameters are stored under
    ``.../adapter/`` next to those of the attention's maps.
    """

    def __call__(self, query_BTHK: Array, mixed_BTHK: Array, attention: "Attention") -> Array: ...


class Attention(nnx.Module):
    """Attends from the queries of some positions to their own keys and to those of other ones.

    G heads of keys and values serve H / G heads of queries each.  A segment of keys with a batch of
    1 is shared by all rows, and multiplied with all their queries in one product.  In
    cross-attention, ``kv_features`` is the width of what keys and values are computed from.
    Methods may set ``adapter``.
    """

    def __init__(
        self,
        config: CausalLMConfig,
        *,
        dtype: DType,
        param_dtype: DType,
        dropout_rate: float,
        rngs: nnx.Rngs,
        kv_features: int | None = None,
    ):
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        self.query_scale, self.softcap = config.query_scale, config.attention_softcap
        self.qkv_clip = config.qkv_clip
        self.alibi = config.positions == "alibi"
        self.dropout_rate = dropout_rate
        self.dtype = dtype

        def linear(
            in_features: int, out_features: int, axes: tuple[str, str], use_bias: bool
        ) -> Linear:
            return Linear(
                in_features,
                out_features,
                axes=axes,
                std=in_features**-0.5,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
                use_bias=use_bias,
            )

        embed = config.embed_dim
        width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.query = linear(embed, width, ("embed", "joined_kv"), config.qkv_bias)
        source = embed if kv_features is None else kv_features
        self.key = linear(source, kv_width, ("embed", "joined_kv"), config.qkv_bias)
        self.value = linear(source, kv_width, ("embed", "joined_kv"), config.qkv_bias)
        self.out = linear(width, embed, ("joined_kv", "embed"), config.out_bias)
        self.adapter: AttentionAdapter | None = nnx.data(None)
        self.qk_norm = config.qk_norm
        if self.qk_norm != "none":
            for name, joined in (("query_norm", width), ("key_norm", kv_width)):
                norm = RMSNorm(
                    self.head_dim if self.qk_norm == "head" else joined,
                    eps=config.norm_eps,
                    dtype=dtype,
                    param_dtype=param_dtype,
                    plus_one=config.norm == "rms_plus_one",
                )
                setattr(self, name, norm)

    def __call__(
        self,
        x_BTD: Array,
        rotation: Rotation | None,
        segments: Sequence[KeyValues],
        biases: Sequence[Array | None],
        *,
        key: Array | None = None,
        whole: Whole | None = None,
    ) -> Array:
        """Attends from the positions of ``x_BTD`` to the keys of all segments together.

        ``biases`` has the result of ``attention_bias`` or ``mask_bias`` for each segment; ``whole``
        replaces them where one kernel attends to all.
        """
        query_BTHK = self._queries_or_keys(self.query(x_BTD), "query_norm", rotation)
        query_BTHK = query_BTHK.astype(jnp.float32) * self.query_scale
        if whole is not None:
            mixed_BTHK = attend_at_once(
                query_BTHK.astype(self.dtype),
                segments,
                whole,
                softcap=self.softcap,
                dropout_rate=self.dropout_rate,
                key=key,
            )
        else:
            mixed_BTHK = self.mix(query_BTHK, segments, biases, key=key)
        if self.adapter is None:
            return self.project(mixed_BTHK)
        return self.adapter(query_BTHK, mixed_BTHK, self)

    def mix(
        self,
        query_BTHK: Array,
        segments: Sequence[KeyValues],
        biases: Sequence[Array | None],
        *,
        key: Array | None = None,
    ) -> Array:
        """Returns the values that scaled queries mix, ``[B, T, H, K]``, by one softmax."""
        groups = (self.num_kv_heads, self.num_heads // self.num_kv_heads)
        query_BTGRK = query_BTHK.reshape(*query_BTHK.shape[:2], *groups, self.head_dim)
        # Heads first: products with keys of all rows and with those of each row have this layout.
        query_GBTRK = query_BTGRK.astype(self.dtype).transpose(2, 0, 1, 3, 4)
        scores = [
            self._scores(query_GBTRK, segment, bias)
            for segment, bias in zip(segments, biases, strict=True)
        ]
        weights = matmul.joint_softmax(tuple(scores))
        keys = split_key(key, len(segments))
        mixed = [
            self._mixed(
                dropout_weights(part, self.dropout_rate, key=dropout_key, query_axis=2), segment
            )
            for part, segment, dropout_key in zip(weights, segments, keys, strict=True)
        ]
        mixed_BTGRK = reduce(jnp.add, mixed).transpose(1, 2, 0, 3, 4)
        return mixed_BTGRK.reshape(query_BTHK.shape)

    def project(self, mixed_BTHK: Array) -> Array:
        """Applies the output map to mixed values."""
        width = self.num_heads * self.head_dim
        return self.out(mixed_BTHK.reshape(*mixed_BTHK.shape[:2], width))

    def keys_values(self, x_BTD: Array, rotation: Rotation | None) -> KeyValues:
        """Computes the keys, normed and rotated, and the values of the positions of ``x_BTD``."""
        key_BTGK = self._queries_or_keys(self.key(x_BTD), "key_norm", rotation)
        return KeyValues(
            key_BPGK=key_BTGK.astype(self.dtype),
            value_BPGK=self._heads(self._clipped(self.value(x_BTD))),
        )

    def _scores(self, query_GBTRK: Array, segment: KeyValues, bias: Array | None) -> Array:
        key_BUGK = segment.key_BPGK
        if key_BUGK.shape[0] == 1:
            scores = matmul.einsum("GBTRK,UGK->GBTRU", query_GBTRK, key_BUGK[0], dtype=self.dtype)
        else:
            scores = matmul.einsum("GBTRK,BUGK->GBTRU", query_GBTRK, key_BUGK, dtype=self.dtype)
        scores = softcap(scores, self.softcap)
        if bias is None:
            return scores
        bias_1BT1U = bias[None, :, :, None, :]
        if self.alibi:
            # Multiply here: the product is as large as the scores and need not be stored.
            slopes_GR = alibi_slopes(self.num_heads).reshape(self.num_kv_heads, -1)
            return scores + jnp.asarray(slopes_GR)[:, None, None, :, None] * bias_1BT1U
        return scores + bias_1BT1U

    def _mixed(self, weights_GBTRU: Array, segment: KeyValues) -> Array:
        value_BUGK = segment.value_BPGK
        if value_BUGK.shape[0] == 1:
            return matmul.einsum("GBTRU,UGK->GBTRK", weights_GBTRU, value_BUGK[0], dtype=self.dtype)
        return matmul.einsum("GBTRU,BUGK->GBTRK", weights_GBTRU, value_BUGK, dtype=self.dtype)

    def _queries_or_keys(self, x_BTJ: Array, norm: str, rotation: Rotation | None) -> Array:
        x_BTJ = self._clipped(x_BTJ)
        x_BTJ = getattr(self, norm)(x_BTJ) if self.qk_norm == "all" else x_BTJ
        x_BTHK = self._heads(x_BTJ)
        x_BTHK = getattr(self, norm)(x_BTHK) if self.qk_norm == "head" else x_BTHK
        return x_BTHK if rotation is None else rotate(x_BTHK, rotation)

    def _clipped(self, x_BTJ: Array) -> Array:
        return jnp.clip(x_BTJ, -self.qkv_clip, self.qkv_clip) if self.qkv_clip else x_BTJ

    def _heads(self, x_BTJ: Array) -> Array:
        heads = x_BTJ.shape[-1] // self.head_dim
        x_BTHK = x_BTJ.reshape(*x_BTJ.shape[:-1], heads, self.head_dim)
        # Keep heads whole: a split head would turn every score into a sum across devices.  Heads of
        # keys and values that the mesh axis does not divide are replicated.
        return with_logical_constraint(x_BTHK, ("batch", "length", "heads", "kv"))


def attention_bias(
    query_positions_BT: Array,
    key_positions_BU: Array,
    *,
    window: int = 0,
    ahead: int | None = 0,
    mask_BU: Array | None = None,
    mask_BTU: Array | None = None,
    alibi: bool = False,
) -> Array | None:
    """Returns scores to add, ``[1 or B, T, U]``, or None if there is no effect.

    With ALiBi they are to be multiplied by each head's slope first.

    Args:
      query_positions_BT: positions of the queries, with a batch of 1 or B.
      key_positions_BU: positions of the keys.
      window: how many positions up to its own a query sees; 0 is all.
      ahead: how many later positions it sees; 0 is causal, and None is all.  It is None, too, if
        all keys are before the queries.
      mask_BU: the real keys.
      mask_BTU: further restricts which key a query sees.
      alibi: subtract the distance from query to key.
    """
    distance_BTU = query_positions_BT[:, :, None] - key_positions_BU[:, None, :]
    visible = []
    if ahead is not None:
        visible.append(distance_BTU >= -ahead)
    if window:
        visible.append(distance_BTU < window)
    if mask_BU is not None:
        visible.append(mask_BU[:, None, :])
    if mask_BTU is not None:
        visible.append(mask_BTU)
    visible_score = -distance_BTU.astype(jnp.float32) if alibi else jnp.zeros((), jnp.float32)
    if not visible:
        return visible_score if alibi else None
    return jnp.where(reduce(jnp.logical_and, visible), visible_score, MASK_VALUE)


def mask_bias(mask_BU: Array | None) -> Array | None:
    """Returns scores to add, ``[B, 1, U]``, for keys without positions; None if all are real."""
    if mask_BU is None:
        return None
    return jnp.where(mask_BU[:, None, :], 0.0, MASK_VALUE).astype(jnp.float32)


def alibi_slopes(num_heads: int) -> HostArray:
    """Returns ALiBi's slopes ``[H]``; see Press et al. 2022 and BLOOM's ``build_alibi_tensor``.

    They are a geometric sequence.  If H is not a power of two, the rest is every other slope of
    twice the power of two below it.
    """

    def geometric(heads: int) -> HostArray:
        return 2.0 ** (-8.0 * np.arange(1, heads + 1) / heads)

    power = 2 ** int(math.log2(num_heads))
    slopes_H = np.concatenate([geometric(power), geometric(2 * power)[::2][: num_heads - power]])
    return slopes_H.astype(np.float32)
