"""Rotary position embeddings (Su et al. 2021), with the halves of a head rotated together."""

import math
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
    scaling = None if separate else config.rope_scaling
    frequencies_F = inverse_frequencies(config.rotary_dim or config.head_dim, theta, scaling)
    angles_BT1F = positions_BT.astype(jnp.float32)[..., None, None] * frequencies_F
    cos, sin = jnp.cos(angles_BT1F), jnp.sin(angles_BT1F)
    if scaling is None or scaling.attention_factor == 1.0:
        return cos, sin
    return scaling.attention_factor * cos, scaling.attention_factor * sin


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
    """Returns the angles ``[width / 2]`` between neighboring positions, in radians."""
    frequencies_F = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    if scaling is not None and scaling.kind == "linear":
        frequencies_F = frequencies_F / scaling.factor
    elif scaling is not None and scaling.kind == "yarn":
        kept_F = 1.0 - _ramp(width, theta, scaling)
        frequencies_F = frequencies_F * (kept_F + (1.0 - kept_F) / scaling.factor)
    elif scaling is not None:
        # The number of turns within the original context decides: few are stretched, many are not.
        turns_F = scaling.original_max_positions * frequencies_F / (2 * np.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept_F = np.clip((turns_F - low) / (high - low), 0.0, 1.0)
        frequencies_F = frequencies_F * (kept_F + (1.0 - kept_F) / scaling.factor)
    return frequencies_F.astype(np.float32)


def _ramp(width: int, theta: float, scaling: RopeScaling) -> HostArray:
    """Returns how far each of the ``width / 2`` frequencies is stretched, from 0 to 1."""

    def index(turns: float) -> float:
        """Returns the index of the frequency that turns so often within the original context."""
        longest = scaling.original_max_positions / (turns * 2 * math.pi)
        return width * math.log(longest) / (2 * math.log(theta))

    low, high = index(scaling.beta_fast), index(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    steps = high - low if high != low else 0.001  # as transformers avoids to divide by 0
    return np.clip((np.arange(width // 2) - low) / steps, 0.0, 1.0)
