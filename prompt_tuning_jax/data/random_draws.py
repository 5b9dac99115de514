"""Random numbers as a hash of (seed, purpose, example), so that each example is independent.

A generator would have to be created for each example; a hash draws for a whole batch in a few NumPy
operations.  B examples.
"""

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def random_bits(count: int, *, seed: int, purpose: int, indices_B: np.ndarray) -> np.ndarray:
    """Draws ``count`` uint64 for each example: [B, count]; SplitMix64 (Steele et al. 2014).

    Draws for different ``purpose`` values are independent.
    """
    run = _mix(np.array([seed % 2**64], np.uint64)) + np.uint64(purpose)
    stream_B = _mix(_mix(run) + indices_B * _GOLDEN)
    return _mix(stream_B[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)


def random_integers(
    low: int, high: int, *, seed: int, purpose: int, indices_B: np.ndarray
) -> np.ndarray:
    """Draws one integer from low to high, both included, for each example: [B], int64."""
    draws_B = random_bits(1, seed=seed, purpose=purpose, indices_B=indices_B)[:, 0]
    return low + (draws_B % np.uint64(high - low + 1)).astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
