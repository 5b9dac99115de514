"""Causal attention for NVIDIA GPUs in one kernel of cuDNN, ``jax.nn.dot_product_attention``.

It gets no bias: cuDNN's backward pass computes the gradient of one whether it is needed or not, and
in JAX 0.10 does not work under ``vmap`` with one that all heads share (jax-ml/jax issues 30593 and
36702).  Lengths and windows say which keys are seen.  JAX asks for even numbers of queries and keys
in training, with a bias or without.
"""

from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp

from prompt_tuning_jax.typing import Array

IMPLEMENTATION: Literal["cudnn", "xla"] = "cudnn"  # a test computes the same without a GPU
# Heads are a multiple of 8 wide, and up to 128, or 256 from Hopper on.
MULTIPLE, WIDEST, WIDEST_FROM_HOPPER, HOPPER = 8, 128, 256, 9.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class CausalLengths:
    """Which keys the queries of a row see: real ones up to their own position.

    Attributes:
      length_B: how many keys of a row are real.
      order_BT: the row's own positions, the real ones first; None if all are.  The keys before
        those are real.
      window: how many positions up to its own a query sees; 0 is all.
    """

    length_B: Array
    order_BT: Array | None
    window: int = field(metadata={"static": True})


def cudnn_attention(
    query_BTHK: Array, key_BUGK: Array, value_BUGK: Array, *, seen: CausalLengths
) -> Array:
    """Attends to the keys that each query sees; returns ``[B, T, H, K]``.

    Queries, keys and values have the dtype of the products; G divides H.  The last query is at the
    position of the last key.
    """
    length, keys = query_BTHK.shape[1], key_BUGK.shape[1]
    before = keys - length
    order_BT = seen.order_BT

    def ordered(x: Array, order_BU: Array) -> Array:
        return jnp.take_along_axis(x, order_BU[..., None, None], axis=1)

    if order_BT is not None:
        # Padding may be anywhere, and cuDNN wants it behind the real keys.
        query_BTHK = ordered(query_BTHK, order_BT)
        order_BU = jnp.pad(order_BT + before, ((0, 0), (before, 0)))
        order_BU = jnp.where(jnp.arange(keys) < before, jnp.arange(keys), order_BU)
        key_BUGK, value_BUGK = ordered(key_BUGK, order_BU), ordered(value_BUGK, order_BU)

    def even(x: Array, first: int = 0) -> Array:
        return jnp.pad(x, ((0, 0), (first, keys % 2), (0, 0), (0, 0)))

    def lengths(number: Array | int) -> Array:
        """Makes lengths that ``vmap`` treats as it treats queries, which JAX 0.10 needs."""
        like_B = jnp.zeros(len(query_BTHK), jnp.int32) + number
        return jnp.where(query_BTHK[:, 0, 0, 0] == 0, like_B, like_B).astype(jnp.int32)

    mixed_BUHK = jax.nn.dot_product_attention(
        even(query_BTHK, before),  # cuDNN aligns the first query with the first key
        even(key_BUGK),
        even(value_BUGK),
        scale=1.0,
        is_causal=True,
        query_seq_lengths=lengths(keys + keys % 2),
        key_value_seq_lengths=lengths(jnp.maximum(seen.length_B, 1)),
        local_window_size=(seen.window - 1, 0) if seen.window else None,
        implementation=IMPLEMENTATION,
    )
    mixed_BTHK = mixed_BUHK[:, before:keys]
    return mixed_BTHK if order_BT is None else ordered(mixed_BTHK, jnp.argsort(order_BT, axis=1))
