"""Rotary position embeddings (Su et al. 2021), with the halves of a head rotated together."""

from typing import TypeAlias

import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax.models.causal_lm.config import CausalLMConfig, RopeScaling
from prompt_tuning_jax.typing import Array, HostArray

# Cosines and sines ``[1 or B, T, 1, rotary_dim / 2]`` of the angles of some positions.
Rotation: TypeAlias = tuple[Array, Array]


def rotation(positions_BT: Array, config: CausalLMConfig, *, local: bool) -> Rotation:
    """Computes the rotation of positions in float32; ``local`` is for layers with a window."""
    separate = local and config.rope_local_theta is not None
    theta = config.rope_local_theta if separate else config.rope_theta
    assert theta is not None
    frequencies_F = inverse_frequencies(
        config.rotary_dim or config.head_dim, theta, None if separate else config.rope_scaling
    )
    angles_BT1F = positions_BT.astype(jnp.float32)[..., None, None] * frequencies_F
    return jnp.cos(angles_BT1F), jnp.sin(angles_BT1F)


def rotate(x_BTHK: Array, by: Rotation) -> Array:
    """Rotates the first ``rotary_dim`` numbers of each head, in float32."""
    cos, sin = by
    half = cos.shape[-1]
    x32_BTHK = x_BTHK.astype(jnp.float32)
    first, second = x32_BTHK[..., :half], x32_BTHK[..., half : 2 * half]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    if 2 * half < x_BTHK.shape[-1]:
        rotated.append(x32_BTHK[..., 2 * half :])
    return jnp.concatenate(rotated, axis=-1)


def inverse_frequencies(width: int, theta: float, scaling: RopeScaling | None) -> HostArray:
    """Returns the angles ``[width / 2]`` between neighbouring positions, in radians."""
    frequencies_F = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    if scaling is not None and scaling.kind == "linear":
        frequencies_F = frequencies_F / scaling.factor
    elif scaling is not None:
        # The number of turns within the original context decides: few are stretched, many are not.
        turns_F = scaling.original_max_positions * frequencies_F / (2 * np.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept_F = np.clip((turns_F - low) / (high - low), 0.0, 1.0)
        frequencies_F = frequencies_F * (kept_F + (1.0 - kept_F) / scaling.factor)
    return frequencies_F.astype(np.float32)
