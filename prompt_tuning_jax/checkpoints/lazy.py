"""Arrays of a checkpoint that are read part by part, when and where they are needed.

A reader of any format gives ``LazyArray``s under this project's parameter names; what lays them out
on devices asks each for the shards it needs, so that the host never holds the whole model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np

from prompt_tuning_jax.typing import HostArray

Index = tuple[slice, ...]


@dataclass(frozen=True, kw_only=True)
class LazyArray:
    """An array that lies somewhere; ``read(index)`` gives a part of it, in its own dtype.

    ``index`` has one slice of step 1 or None per dimension.  ``where`` names file and array, for
    messages.  ``read`` raises UserError for what is missing or damaged.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    where: str
    read: Callable[[Index], HostArray]

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return prod(self.shape) * self.dtype.itemsize

    def whole(self) -> HostArray:
        return self.read(tuple(slice(None) for _ in self.shape))

    def transposed(self) -> "LazyArray":
        """Axes in the opposite order."""
        return LazyArray(
            shape=self.shape[::-1],
            dtype=self.dtype,
            where=self.where,
            read=lambda index: self.read(index[::-1]).T,
        )

    def layer(self, number: int, *, axis: int) -> "LazyArray":
        """One entry along an axis, which is dropped: a layer of a stack."""

        def read(index: Index) -> HostArray:
            whole = (*index[:axis], slice(number, number + 1), *index[axis:])
            return np.squeeze(self.read(whole), axis)

        return LazyArray(
            shape=(*self.shape[:axis], *self.shape[axis + 1 :]),
            dtype=self.dtype,
            where=self.where,
            read=read,
        )


def in_memory(array: HostArray, *, where: str) -> LazyArray:
    """An array that is there already."""
    array = np.asarray(array)
    return LazyArray(
        shape=array.shape, dtype=array.dtype, where=where, read=lambda index: array[index]
    )
