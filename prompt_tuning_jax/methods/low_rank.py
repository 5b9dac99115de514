"""Low-rank updates of a linear map's weights, and the norms of the updated weights."""

import jax
import jax.numpy as jnp

from prompt_tuning_jax.typing import Array

_SMALLEST = 1e-30  # what a norm's square is at least, since norms divide


def low_rank_update(a_DR: Array, b_RF: Array, scale: float) -> Array:
    """Computes ``scale * a @ b`` in float32."""
    return scale * jnp.matmul(a_DR, b_RF, precision=jax.lax.Precision.HIGHEST)


def updated_norms(kernel_DF: Array, a_DR: Array, b_RF: Array, scale: float) -> Array:
    """Computes the norm of each column of ``kernel + scale * a @ b`` in float32.

    The update itself is never formed, so it costs little where each row of a batch has its own
    ``a`` and ``b``.
    """
    highest = jax.lax.Precision.HIGHEST
    kernel_DF = kernel_DF.astype(jnp.float32)
    cross_RF = scale * jnp.matmul(a_DR.T, kernel_DF, precision=highest)
    gram_RR = scale**2 * jnp.matmul(a_DR.T, a_DR, precision=highest)
    squares_F = jnp.sum(jnp.square(kernel_DF), axis=0)
    of_update_RF = 2 * cross_RF + jnp.matmul(gram_RR, b_RF, precision=highest)
    return jnp.sqrt(jnp.maximum(squares_F + jnp.sum(b_RF * of_update_RF, axis=0), _SMALLEST))
