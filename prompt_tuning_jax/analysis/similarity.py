"""How alike prompts are, and with them tasks (SPoT: Vu et al. 2022, section 4)."""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.typing import Array, HostArray

By = Literal["mean", "tokens"]
BY: tuple[By, ...] = get_args(By)


def similarity(a_PD: Array | HostArray, b_QD: Array | HostArray, *, by: By = "mean") -> float:
    """The similarity of two prompts of one width, from -1 to 1; their lengths may differ.

    ``mean``: the cosine of the means of their positions, 1 of a prompt with itself.  ``tokens``:
    the mean of the cosines of all pairs of positions, which is 1 only where all point one way.  A
    position of zeros is like nothing.  The paper's two metrics.
    """
    a, b = np.asarray(a_PD, np.float64), np.asarray(b_QD, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise UserError(f"prompts {list(a.shape)} and {list(b.shape)} have no width in common")
    if by == "mean":
        return float(np.clip(_directions(a.mean(axis=0)) @ _directions(b.mean(axis=0)), -1, 1))
    return float((_directions(a) @ _directions(b).T).mean())


def mixture(prompts: Sequence[Array | HostArray], weights: Sequence[float]) -> HostArray:
    """``[P, D]``: the mean of prompts of one shape, each counting by its weight.

    Section 4's mixture of the nearest source prompts has their similarities as weights.  Raises
    UserError for other shapes, and for weights that are not above zero.
    """
    arrays = [np.asarray(prompt, np.float64) for prompt in prompts]
    shapes = sorted({array.shape for array in arrays})
    if len(shapes) != 1:
        shown = " and ".join(str(list(shape)) for shape in shapes)
        raise UserError(f"a mixture takes prompts of one shape, and these have {shown}")
    if min(weights) <= 0:
        raise UserError(
            f"a mixture counts prompts by their similarity, and {min(weights):.3f} is not above 0"
        )
    shares = np.asarray(weights, np.float64) / sum(weights)
    return np.tensordot(shares, np.stack(arrays), 1).astype(np.float32)


def _directions(vectors_XD: HostArray) -> HostArray:
    """Unit vectors, and zeros where there is no direction."""
    norms = np.linalg.norm(vectors_XD, axis=-1, keepdims=True)
    directions: HostArray = vectors_XD / np.where(norms == 0, 1, norms)
    return directions
