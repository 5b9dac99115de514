"""Random changes of training images, which depend on the seed, the step and the row alone."""

from collections.abc import Sequence

import numpy as np

from prompt_tuning_jax.data.random_draws import random_bits

_FLIP, _SHIFT = 0xF11B, 0x5E1F7  # purposes of the random numbers
_SHIFTED = 8  # a crop moves by up to this fraction of the image


def augmented(
    pixels_BT: np.ndarray,
    changes: Sequence[str],
    *,
    shape: tuple[int, int, int],
    seed: int,
    step: int,
    rows_B: np.ndarray,
) -> np.ndarray:
    """Returns images changed at random, each depending only on ``seed``, ``step`` and its row.

    ``flip`` mirrors half of them left to right.  ``crop`` moves each by up to an eighth of its
    size, up or down and left or right, and repeats its edge, as a random crop of an enlarged image
    does.  ``shape`` is height, width and channels.
    """
    images_BHWC = pixels_BT.reshape(-1, *shape)
    drawn = (np.asarray(rows_B, np.uint64) << np.uint64(32)) + np.uint64(step)
    if "flip" in changes:
        bits_B = random_bits(1, seed=seed, purpose=_FLIP, indices_B=drawn)[:, 0]
        flips_B = (bits_B >> np.uint64(63)).astype(bool)
        images_BHWC = np.where(flips_B[:, None, None, None], images_BHWC[:, :, ::-1], images_BHWC)
    if "crop" in changes:
        bits_B2 = random_bits(2, seed=seed, purpose=_SHIFT, indices_B=drawn)
        moved = []
        for image_HWC, bits_2 in zip(images_BHWC, bits_B2, strict=True):
            at = [_positions(size, int(bits)) for size, bits in zip(shape, bits_2, strict=False)]
            moved.append(image_HWC[at[0][:, None], at[1][None, :]])
        images_BHWC = np.stack(moved)
    return images_BHWC.reshape(pixels_BT.shape)


def _positions(size: int, bits: int) -> np.ndarray:
    """Returns the row or column that each comes from after a shift."""
    most = max(1, size // _SHIFTED)
    shift = bits % (2 * most + 1) - most
    return np.clip(np.arange(size) + shift, 0, size - 1)
