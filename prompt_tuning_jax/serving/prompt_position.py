"""What programs of all kinds share: arrays on the device, and the scores of each row's targets."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from prompt_tuning_jax.distributed.sharding import Partitioner
from prompt_tuning_jax.inference.decoding.rank import sequence_log_probs
from prompt_tuning_jax.models.t5.config import TokenIds
from prompt_tuning_jax.typing import Array, HostArray

_MOST_LOGITS = 2**26  # numbers that are held at once


def device_put(
    array: HostArray, axes: tuple[str | None, ...], partitioner: Partitioner | None
) -> Array:
    """On the device; on a mesh divided by its logical axes."""
    if partitioner is None or partitioner.is_single_device:
        return jnp.asarray(array)
    return jax.device_put(array, partitioner.sharding(axes, array.shape))


def scored(
    logits_of: Callable[[Array], Array], targets_BCS: Array, *, vocab_size: int, token_ids: TokenIds
) -> Array:
    """``[B, C]``: summed log-probabilities; ``logits_of`` decodes one target ``[B, S]`` of each."""

    def one(targets_BS: Array) -> Array:
        shifted_BS = jnp.pad(targets_BS, ((0, 0), (1, 0)), constant_values=token_ids.start)[:, :-1]
        return sequence_log_probs(logits_of(shifted_BS), targets_BS, padding=token_ids.fill)

    batch, number, length = targets_BCS.shape
    at_once = _MOST_LOGITS // (batch * length * vocab_size)
    targets_CBS = targets_BCS.swapaxes(0, 1)
    if at_once >= number:
        return jax.vmap(one)(targets_CBS).T
    return lax.map(one, targets_CBS, batch_size=max(1, at_once)).T
