"""A mesh with its rules, and what they do to batches, parameters and activations."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from prompt_tuning_jax.distributed.sharding import (
    RULES,
    Rules,
    fitting,
    put,
    shard,
    size_of,
    spec_of,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Partitioner:
    """A mesh and the rules that lay arrays out over it; equal ones hash alike."""

    mesh: jax.sharding.Mesh
    rules: Rules = dataclasses.field(default_factory=lambda: RULES)

    def __hash__(self) -> int:
        return hash((self.mesh, tuple(sorted(self.rules))))

    @property
    def is_single_device(self) -> bool:
        """Whether there is one device, and nothing to lay out."""
        return bool(self.mesh.size == 1)

    @property
    def num_batch_shards(self) -> int:
        """How many parts the batch is divided into."""
        return size_of(spec_of(("batch",), self.rules)[0], self.mesh)

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def sharding(self, axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
        """How an array with these logical axes and this shape lies."""
        return NamedSharding(self.mesh, fitting(spec_of(axes, self.rules), shape, self.mesh))

    def shard(
        self, arrays: Mapping[str, Any], logical_axes: Mapping[str, Sequence[str | None]]
    ) -> dict[str, jax.Array]:
        """Arrays by path, laid out; see ``sharding.shard``."""
        return shard(arrays, logical_axes, self.mesh, self.rules)

    def rows(self, batch_size: int) -> np.ndarray:
        """Which of a batch's rows lie on devices of this process, in rising order."""
        partitioner = self.sharding(("batch",), (batch_size,))
        mine = np.zeros(batch_size, bool)
        for index in partitioner.addressable_devices_indices_map((batch_size,)).values():
            mine[index or slice(None)] = True
        return np.flatnonzero(mine)

    def shard_rows(
        self, local: np.ndarray, axes: Sequence[str | None], *, rows: np.ndarray, batch_size: int
    ) -> jax.Array:
        """The global array of which this process has ``rows`` of the axis ``batch``."""
        axis = list(axes).index("batch")
        shape = (*local.shape[:axis], batch_size, *local.shape[axis + 1 :])

        def part(index: Any) -> np.ndarray:
            wanted = np.arange(batch_size)[index[axis]]
            here = list(index)
            # The rows of a part follow each other, and so they do among a process's own.
            first = int(np.searchsorted(rows, wanted[0]))
            here[axis] = slice(first, first + len(wanted))
            return local[tuple(here)]

        return jax.make_array_from_callback(shape, self.sharding(axes, shape), part)

    def shard_batch(self, batch: Mapping[str, Any], axes: Sequence[str | None]) -> dict[str, Any]:
        """A batch that every process holds whole, with its rows divided over the mesh."""
        if self.is_single_device:
            return dict(batch)
        return {
            name: put(array, self.sharding(axes[: array.ndim], array.shape))
            for name, array in batch.items()
        }

    def replicate_arrays(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """Arrays that are on no mesh yet, the same on every device; others stay as they lie."""
        if self.is_single_device:
            return dict(arrays)

        def place(array: Any) -> Any:
            on_mesh = isinstance(array, jax.Array) and isinstance(array.sharding, NamedSharding)
            return array if on_mesh else put(array, self.replicated)

        return {name: place(array) for name, array in arrays.items()}


# Set while a step is traced, by the function that is traced: models know no mesh.
_TRACED: ContextVar[Partitioner | None] = ContextVar("layout of the step that is being traced")


@contextmanager
def activation_sharding(partitioner: Partitioner | None) -> Iterator[None]:
    """Makes ``with_logical_constraint`` use this mesh; entered by the function that is traced."""
    token = _TRACED.set(
        None if partitioner is None or partitioner.is_single_device else partitioner
    )
    try:
        yield
    finally:
        _TRACED.reset(token)


def with_logical_constraint(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Tells the compiler how an activation lies; x itself where there is no mesh."""
    partitioner = _TRACED.get(None)
    if partitioner is None:
        return x
    return jax.lax.with_sharding_constraint(x, partitioner.sharding(axes, x.shape))


def on_a_mesh() -> bool:
    """Whether the traced function will be sharded, so ``with_logical_constraint`` has an effect."""
    return _TRACED.get(None) is not None


def replicate(tree: Any) -> Any:
    """Replicates results that every process needs whole, if the function is sharded."""
    partitioner = _TRACED.get(None)
    if partitioner is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, partitioner.replicated)
