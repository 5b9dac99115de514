"""What the attentions of all families share: the score of a masked key, and dropout of weights."""

import jax.numpy as jnp

from prompt_tuning_jax.models.layers import dropout
from prompt_tuning_jax.typing import Array, DType

# Added to the scores of masked keys; finite, so that a fully masked row does not give NaN, and so
# large that ALiBi's smallest slope, 2**-8, leaves enough of it.
MASK_VALUE = -1e13


def dropout_weights(
    weights: Array, rate: float, *, key: Array | None, query_axis: int = -2
) -> Array:
    """Applies dropout to attention weights ``[..., U]`` with one mask for all examples and heads.

    The mask differs between queries (``query_axis``) and keys (the last axis), as in T5X.
    """
    shape = [1] * weights.ndim
    shape[query_axis], shape[-1] = weights.shape[query_axis], weights.shape[-1]
    factors = dropout_factors(tuple(shape), rate, key=key, dtype=weights.dtype)
    return weights if factors is None else weights * factors


def dropout_factors(
    shape: tuple[int, ...], rate: float, *, key: Array | None, dtype: DType = jnp.float32
) -> Array | None:
    """Draws what dropout multiplies attention weights with; None if it changes nothing."""
    if key is None or rate == 0.0:
        return None
    return dropout(jnp.ones(shape, dtype), rate, key=key)
