"""Cross entropy over target tokens, in float32."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from prompt_tuning_jax.models.output_head import LazyLogits, statistics_of
from prompt_tuning_jax.typing import Array, HostArray


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TokenSums:
    """Sums over a batch: loss, real target tokens, examples, and fully correct examples."""

    loss: Array
    tokens: Array
    examples: Array
    correct: Array


def token_sums(
    logits_BSV: Array | LazyLogits,
    targets_BS: Array | HostArray,
    *,
    z_loss: float = 0.0,
    padding: int = 0,
    weights_B: Array | HostArray | None = None,
) -> TokenSums:
    """Sums the cross entropy plus ``z_loss * log(Z)**2`` over all tokens that are not padding.

    T5X trains on the same sum (t5x/losses.py); divide by ``tokens`` to get the mean.  Rows that
    contain only padding are ignored.  ``weights_B`` scales each example's loss and token count, but
    not ``examples`` and ``correct``, which always count examples.
    """
    targets_BS = jnp.asarray(targets_BS)
    real_BS = targets_BS != padding
    of = statistics_of(logits_BSV, targets_BS)
    loss_BS = of.log_z - of.target + z_loss * jnp.square(of.log_z)
    right_BS = (of.best == targets_BS) | ~real_BS
    counted_BS = real_BS.astype(jnp.float32)
    if weights_B is not None:
        weights_B1 = jnp.asarray(weights_B, jnp.float32)[:, None]
        loss_BS, counted_BS = loss_BS * weights_B1, counted_BS * weights_B1
    some_B = jnp.any(real_BS, axis=-1)
    return TokenSums(
        loss=jnp.sum(jnp.where(real_BS, loss_BS, 0.0)),
        tokens=jnp.sum(counted_BS),
        examples=jnp.sum(some_B, dtype=jnp.float32),
        correct=jnp.sum(some_B & jnp.all(right_BS, axis=-1), dtype=jnp.float32),
    )


def class_sums(
    logits_BC: Array,
    class_B: Array,
    *,
    z_loss: float = 0.0,
    weights_B: Array | HostArray | None = None,
) -> TokenSums:
    """Computes the sums of ``token_sums`` for a choice among classes; class -1 is ignored."""
    none_B1 = jnp.full((len(logits_BC), 1), jnp.finfo(jnp.float32).min / 2)
    # Shift classes by one, because class 0 would count as padding.
    logits_B1C = jnp.concatenate([none_B1, logits_BC.astype(jnp.float32)], axis=1)[:, None]
    return token_sums(logits_B1C, class_B[:, None] + 1, z_loss=z_loss, weights_B=weights_B)
