"""Cross entropy over target tokens, in float32."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from prompt_tuning_jax.typing import Array, HostArray


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TokenSums:
    """Sums over a batch: loss, real target tokens, examples, and examples wholly right."""

    loss: Array
    tokens: Array
    examples: Array
    correct: Array


def token_sums(
    logits_BSV: Array,
    targets_BS: Array | HostArray,
    *,
    z_loss: float = 0.0,
    padding: int = 0,
    weights_B: Array | HostArray | None = None,
) -> TokenSums:
    """Summed cross entropy over tokens that are not padding, plus ``z_loss * log(Z)**2`` each.

    The sum is what T5X trains on (t5x/losses.py); divided by ``tokens`` it is the mean.  Rows that
    are all padding count for nothing.  With ``weights_B`` each example's loss and tokens count so
    many times; ``examples`` and ``correct`` are numbers of examples all the same.
    """
    logits_BSV, targets_BS = logits_BSV.astype(jnp.float32), jnp.asarray(targets_BS)
    real_BS = targets_BS != padding
    log_z_BS = jax.nn.logsumexp(logits_BSV, axis=-1)
    target_BS = jnp.take_along_axis(logits_BSV, targets_BS[..., None], axis=-1)[..., 0]
    loss_BS = log_z_BS - target_BS + z_loss * jnp.square(log_z_BS)
    right_BS = (jnp.argmax(logits_BSV, axis=-1) == targets_BS) | ~real_BS
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
    """The same for one choice among classes in place of tokens; class -1 counts for nothing."""
    none_B1 = jnp.full((len(logits_BC), 1), jnp.finfo(jnp.float32).min / 2)
    # Class 0 of a sequence of one would be padding.
    logits_B1C = jnp.concatenate([none_B1, logits_BC.astype(jnp.float32)], axis=1)[:, None]
    return token_sums(logits_B1C, class_B[:, None] + 1, z_loss=z_loss, weights_B=weights_B)
