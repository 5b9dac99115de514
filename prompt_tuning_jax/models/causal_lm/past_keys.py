"""Keys and values of all layers at positions that are computed once and attended to later."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from prompt_tuning_jax.models.injections import KeyValues
from prompt_tuning_jax.models.layers import put_in_front
from prompt_tuning_jax.typing import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PastKeys:
    """Keys and values, of all layers, of other positions than those being computed.

    Attributes:
      layers: for each layer, keys and values ``[1 or B, U, G, K]``.
      positions_BU: their positions, with a batch of 1 or B, all before those being computed; None
        if they have no positions, and are then visible regardless of windows.
      mask_BU: the real ones among them; None is all.
    """

    layers: tuple[KeyValues, ...]
    positions_BU: Array | None
    mask_BU: Array | None = None


def past_keys(
    layers: tuple[KeyValues, ...],
    *,
    start: Array | int = 0,
    mask_BU: Array | None = None,
    lengths_B: Array | None = None,
) -> PastKeys:
    """Assigns positions from ``start`` on to the keys and values of all layers.

    Either the first ``lengths_B`` of each row are real, or those of ``mask_BU``, or all.
    """
    positions_BU = consecutive(start, num_positions(layers))
    if lengths_B is not None:
        mask_BU = positions_BU < lengths_B[:, None]
    elif mask_BU is not None:
        positions_BU = positions_in(mask_BU, start=start)
    return PastKeys(layers=layers, positions_BU=positions_BU, mask_BU=mask_BU)


def consecutive(start: Array | int, length: int) -> Array:
    """Returns ``length`` positions ``[1 or B, length]`` from ``start`` on."""
    return start + jnp.arange(length)[None]


def positions_in(mask_BU: Array, *, start: Array | int = 0) -> Array:
    """Counts the real positions; a masked one has the position of the real one before it."""
    return start - 1 + jnp.cumsum(mask_BU, axis=1)


def num_positions(layers: tuple[KeyValues, ...]) -> int:
    """Returns the number of positions that have keys and values; 0 if there are none at all."""
    return layers[0].key_BPGK.shape[1] if layers else 0


def concatenate_positions(
    first: tuple[KeyValues, ...], second: tuple[KeyValues, ...]
) -> tuple[KeyValues, ...]:
    """Concatenates the positions of two segments, layer by layer."""
    if not (first and second):
        return first or second
    both: tuple[KeyValues, ...] = jax.tree.map(put_in_front, first, second)
    return both
