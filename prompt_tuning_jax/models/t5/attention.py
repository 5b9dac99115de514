"""Multi-head attention as in T5: positions and masks are additive scores.

T5's has neither biases nor a factor 1/sqrt(K); vision transformers have both.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax.distributed.sharding import with_logical_constraint
from prompt_tuning_jax.models.config import ModelConfig
from prompt_tuning_jax.models.injections import KeyValues
from prompt_tuning_jax.models.layers import Linear, RMSNorm, normal_param, put_in_front
from prompt_tuning_jax.models.ops import matmul
from prompt_tuning_jax.models.ops.attention import MASK_VALUE, dropout_factors, dropout_weights
from prompt_tuning_jax.models.ops.fused_attention import fused_attention
from prompt_tuning_jax.models.ops.fused_tiles import Visibility
from prompt_tuning_jax.models.t5.config import T5Config
from prompt_tuning_jax.typing import Array, DType


class RelativePositionBias(nnx.Module):
    """A learned score per head and distance bucket, for a whole stack or a single layer."""

    def __init__(
        self, config: T5Config, *, bidirectional: bool, param_dtype: DType, rngs: nnx.Rngs
    ):
        shape = (config.num_heads, config.relpos_num_buckets)
        self.rel_embedding = normal_param(
            rngs, shape, ("heads", "relpos_buckets"), std=config.embed_dim**-0.5, dtype=param_dtype
        )
        self.bidirectional = bidirectional
        self.num_buckets = config.relpos_num_buckets
        self.max_distance = config.relpos_max_distance

    def __call__(self, query_positions_Q: Array, key_positions_K: Array) -> Array:
        """Returns scores ``[1, H, Q, K]`` in float32."""
        return self.at(key_positions_K[None, :] - query_positions_Q[:, None])[None]

    def at(self, distances: Array) -> Array:
        """Returns the scores ``[H, ...]`` of distances, key position minus query position."""
        buckets = relative_position_bucket(
            distances,
            bidirectional=self.bidirectional,
            num_buckets=self.num_buckets,
            max_distance=self.max_distance,
        )
        table_HN = self.rel_embedding.get_value().astype(jnp.float32)
        return jnp.take(table_HN, buckets, axis=1)


def relative_position_bucket(
    distance: Array, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> Array:
    """Returns the bucket of ``distance``, the key position minus the query position.

    Small distances have exact buckets, and large distances have logarithmic ones.  See Raffel et
    al. 2020, section 2.1, and RelativePositionBiases in t5x/examples/t5/layers.py.
    """
    bucket = jnp.zeros_like(distance)
    behind = -distance
    if bidirectional:
        num_buckets //= 2
        bucket += jnp.where(behind < 0, num_buckets, 0)
        behind = jnp.abs(behind)
    else:
        behind = jnp.maximum(behind, 0)
    exact = num_buckets // 2
    # The epsilon matches the reference; it determines the bucket if the logarithm is an integer.
    ratio = behind.astype(jnp.float32) / exact + jnp.finfo(jnp.float32).eps
    far = exact + (jnp.log(ratio) / math.log(max_distance / exact) * (num_buckets - exact)).astype(
        jnp.int32
    )
    return bucket + jnp.where(behind < exact, behind, jnp.minimum(far, num_buckets - 1))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class FusedBias:
    """What ``fused_attention`` adds to scores: a bias by distance, and a mask of the keys."""

    bias_HN: Array
    seen: Visibility


class Attention(nnx.Module):
    """Attends from the queries of one sequence to keys and values of the same or another one.

    ``query_scale`` is a factor on the scores, which T5 does not have.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: DType,
        param_dtype: DType,
        dropout_rate: float,
        rngs: nnx.Rngs,
        query_scale: float = 1.0,
        qkv_bias: bool = False,
        out_bias: bool = False,
    ):
        embed, heads, kv = config.embed_dim, config.num_heads, config.head_dim
        self.num_heads, self.head_dim = heads, kv
        self.query_scale = query_scale
        self.dropout_rate = dropout_rate
        self.dtype = dtype

        def linear(
            in_features: int,
            out_features: int,
            axes: tuple[str, str],
            std: float,
            use_bias: bool = qkv_bias,
        ) -> Linear:
            return Linear(
                in_features,
                out_features,
                axes=axes,
                std=std,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
                use_bias=use_bias,
            )

        # T5 omits 1/sqrt(K) in attention and folds it into the initialization of the queries.
        joined = heads * kv
        query_std = (embed * kv) ** -0.5 / query_scale
        self.query = linear(embed, joined, ("embed", "joined_kv"), query_std)
        self.key = linear(embed, joined, ("embed", "joined_kv"), embed**-0.5)
        self.value = linear(embed, joined, ("embed", "joined_kv"), embed**-0.5)
        self.out = linear(joined, embed, ("joined_kv", "embed"), joined**-0.5, use_bias=out_bias)

    def __call__(
        self,
        x_BTD: Array,
        key_values: KeyValues,
        bias_BHTU: Array | FusedBias | None,
        *,
        prefix: KeyValues | None = None,
        key: Array | None = None,
    ) -> Array:
        """Attends from the positions of ``x_BTD`` to ``key_values``.

        ``bias_BHTU`` combines the position scores and the masks; None if there are none.  With a
        ``FusedBias``, which covers the keys of the prefix as well, one kernel does all.
        """
        query_BTHK = self._heads(self.query(x_BTD))
        if self.query_scale != 1.0:
            query_BTHK = query_BTHK * jnp.asarray(self.query_scale, query_BTHK.dtype)
        key_BUHK, value_BUHK = key_values.key_BPGK, key_values.value_BPGK
        if prefix is not None:
            key_BUHK = put_in_front(prefix.key_BPGK, key_BUHK)
            value_BUHK = put_in_front(prefix.value_BPGK, value_BUHK)
            if bias_BHTU is not None and not isinstance(bias_BHTU, FusedBias):
                bias_BHTU = pad_in_front(bias_BHTU, to=key_BUHK.shape[1])
        if isinstance(bias_BHTU, FusedBias):
            mixed_BTHK = fused_attention(
                query_BTHK.astype(self.dtype),
                key_BUHK.astype(self.dtype),
                value_BUHK.astype(self.dtype),
                bias_HN=bias_BHTU.bias_HN,
                seen=bias_BHTU.seen,
                keep_TU=dropout_factors(
                    (query_BTHK.shape[1], key_BUHK.shape[1]), self.dropout_rate, key=key
                ),
            )
            return self.out(mixed_BTHK.reshape(*mixed_BTHK.shape[:2], -1))
        scores_BHTU = matmul.einsum("BTHK,BUHK->BHTU", query_BTHK, key_BUHK, dtype=self.dtype)
        if bias_BHTU is not None:
            scores_BHTU = scores_BHTU + bias_BHTU
        weights_BHTU = matmul.softmax(scores_BHTU)
        weights_BHTU = dropout_weights(weights_BHTU, self.dropout_rate, key=key)
        mixed_BTHK = matmul.einsum("BHTU,BUHK->BTHK", weights_BHTU, value_BUHK, dtype=self.dtype)
        return self.out(mixed_BTHK.reshape(*mixed_BTHK.shape[:2], -1))

    def keys_values(self, x_BUD: Array) -> KeyValues:
        """Computes the keys and values of the sequence to attend to."""
        return KeyValues(
            key_BPGK=self._heads(self.key(x_BUD)), value_BPGK=self._heads(self.value(x_BUD))
        )

    def _heads(self, x_BTJ: Array) -> Array:
        x_BTHK = x_BTJ.reshape(*x_BTJ.shape[:-1], self.num_heads, self.head_dim)
        # Keep heads whole: a split head would turn every score into a sum across devices.
        return with_logical_constraint(x_BTHK, ("batch", "length", "heads", "kv"))


def bias_of(mask_BQK: Array) -> Array:
    """Converts a boolean (query, key) mask to additive scores ``[B, 1, Q, K]``."""
    return jnp.where(mask_BQK[:, None], 0.0, MASK_VALUE).astype(jnp.float32)


def pad_in_front(bias_BHTU: Array, *, to: int) -> Array:
    """Pads a bias with zeros at the front to ``to`` keys, for prefix keys that it lacks."""
    ahead = to - bias_BHTU.shape[-1]
    return jnp.pad(bias_BHTU, ((0, 0), (0, 0), (0, 0), (ahead, 0))) if ahead else bias_BHTU


def positions_before(prefix: KeyValues | None) -> int:
    """Returns how many positions before the sequence a prefix has."""
    return prefix.key_BPGK.shape[1] if prefix and prefix.before else 0


def with_positions_before(positions: Array, number: int) -> Array:
    """Puts that many positions before those of a sequence, which start from 0."""
    return jnp.concatenate([jnp.arange(-number, 0), positions]) if number else positions


def make_norm(config: T5Config, *, dtype: DType, param_dtype: DType) -> RMSNorm:
    """Makes the norm of hidden states."""
    return RMSNorm(
        config.embed_dim, eps=config.layer_norm_eps, dtype=dtype, param_dtype=param_dtype
    )
