"""How arrays are sharded: one table from logical axes to mesh axes, and a mesh.

Models name the logical axes of their parameters and activations, for instance ``("embed", "mlp")``
for a kernel ``[D, F]``, and do not depend on devices.  The mesh has three axes:

=========  ====================================================================================
``data``   copies of the weights; each takes a part of the batch (data parallelism)
``fsdp``   also divides the batch, and shards the weights, which are gathered layer by layer
``model``  shards heads, MLP and vocabulary; activations are summed over it (tensor parallelism)
=========  ====================================================================================

``RULES`` maps logical axes to mesh axes.  With a mesh ``data=2, fsdp=2, model=2``, the kernel
``("embed", "mlp")`` has the ``PartitionSpec("fsdp", "model")``: each device holds a quarter, and
each quarter is on two devices.  A batch ``("batch", "length")`` has the
``PartitionSpec(("data", "fsdp"), None)``, which splits it into four parts.  An array uses each mesh
axis at most once, for the first logical axis that maps to it.  A dimension that its mesh axes do
not divide is replicated.  Prompts and other trainable arrays are small and replicated.  The
experiment's ``mesh.rules`` changes entries of the table.

The compiler derives everything else from the shardings of the inputs.  ``with_logical_constraint``
pins an activation where the compiler would choose badly.  It uses the mesh of
``activation_sharding``, which the jitted function enters while it is traced.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import MappingProxyType
from typing import Any, TypeAlias, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from prompt_tuning_jax.config.field_syntax import MESH_AXES, parse_rules
from prompt_tuning_jax.errors import UserError

Rules: TypeAlias = Mapping[str, str | tuple[str, ...] | None]

# Logical axis -> mesh axes; None means replicated.  A logical axis without an entry is an error.
RULES: Rules = MappingProxyType(
    {
        "batch": ("data", "fsdp"),
        "length": None,
        "embed": "fsdp",
        "heads": "model",
        "kv": None,
        "joined_kv": "model",  # heads x kv in one dimension, as in T5X's kernels
        "mlp": "model",
        "vocab": "model",
        "relpos_buckets": None,
        "norm": None,
        "patch": None,  # the pixels of a patch
        "prompt": None,
        "prompt_embed": None,
        "tasks": None,
        "ensemble": None,
    }
)


def with_rules(texts: Sequence[str]) -> Rules:
    """Returns ``RULES`` with the entries of ``mesh.rules`` replaced or added."""
    return MappingProxyType({**RULES, **parse_rules(texts)})


def make_mesh(
    *,
    data: int = -1,
    fsdp: int = 1,
    model: int = 1,
    dcn_data: int = 1,
    dcn_fsdp: int = 1,
    dcn_model: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> jax.sharding.Mesh:
    """Creates a mesh over all devices; one size may be -1, and is then inferred.

    ``data``, ``fsdp`` and ``model`` are the sizes within a slice, or within a host where devices
    have no slices; the ``dcn`` sizes are numbers of slices.  The size of a mesh axis is the product
    of the two.  If all ``dcn`` sizes are 1, devices keep their order.  Raises UserError unless the
    product of the sizes is the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes, dcn = [data, fsdp, model], [dcn_data, dcn_fsdp, dcn_model]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"mesh sizes {sizes} must be positive, and at most one may be -1")
    if min(dcn) < 1:
        raise UserError(f"mesh dcn sizes {dcn} must be positive")
    known = int(np.prod([size for size in sizes if size != -1])) * int(np.prod(dcn))
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(len(devices) // known, 1)
    if int(np.prod(sizes)) * int(np.prod(dcn)) != len(devices):
        named = [*zip(MESH_AXES, sizes, strict=True)]
        named += [(f"dcn_{axis}", n) for axis, n in zip(MESH_AXES, dcn, strict=True) if n > 1]
        shape = ", ".join(f"{axis}={size}" for axis, size in named)
        raise UserError(
            f"mesh {shape} does not fit {len(devices)} devices; set it with --mesh, "
            "for instance --mesh data=-1,model=1"
        )
    types = (AxisType.Auto,) * 3
    if max(dcn) == 1:
        return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=types, devices=tuple(devices))
    return jax.sharding.Mesh(_hybrid(sizes, dcn, devices), MESH_AXES, axis_types=types)


def _hybrid(sizes: list[int], dcn: list[int], devices: Sequence[jax.Device]) -> Any:
    """Arranges devices so that those of a slice (without slices, of a process) are adjacent."""
    slices = {getattr(device, "slice_index", None) for device in devices}
    in_slices = len(slices) > 1 and None not in slices
    granules = slices if in_slices else {device.process_index for device in devices}
    if len(granules) != int(np.prod(dcn)):
        raise UserError(
            f"mesh.dcn_data x dcn_fsdp x dcn_model is {int(np.prod(dcn))} and there are "
            f"{len(granules)} {'slices' if in_slices else 'processes'}; make them equal"
        )
    return mesh_utils.create_hybrid_device_mesh(
        sizes, dcn, devices, process_is_granule=not in_slices
    )


def logical_to_mesh_axes(axes: Sequence[str | None], rules: Rules = RULES) -> PartitionSpec:
    """Returns the PartitionSpec for logical axes; it uses each mesh axis at most once.

    Raises KeyError for a logical axis that has no rule.
    """
    used: set[str] = set()
    spec: list[str | tuple[str, ...] | None] = []
    for axis in axes:
        rule = None if axis is None else rules[axis]
        wanted = (rule,) if isinstance(rule, str) else tuple(rule or ())
        free = tuple(name for name in wanted if name not in used)
        used.update(free)
        spec.append(None if not free else free[0] if len(free) == 1 else free)
    return PartitionSpec(*spec)


def shard(
    arrays: Mapping[str, jax.Array],
    logical_axes: Mapping[str, Sequence[str | None]],
    mesh: jax.sharding.Mesh,
    rules: Rules = RULES,
) -> dict[str, jax.Array]:
    """Shards arrays, given by path, over the mesh; arrays that already have the sharding stay.

    With several processes, each must hold the whole array, or all of them the same global array.
    """
    if mesh.size == 1:
        return dict(arrays)
    shapes = {name: array.shape for name, array in arrays.items()}
    shardings = logical_to_mesh_sharding(shapes, logical_axes, mesh, rules)
    return {name: device_put(array, shardings[name]) for name, array in arrays.items()}


def logical_to_mesh_sharding(
    shapes: Mapping[str, Sequence[int]],
    logical_axes: Mapping[str, Sequence[str | None]],
    mesh: jax.sharding.Mesh,
    rules: Rules = RULES,
) -> dict[str, NamedSharding]:
    """Returns the shardings of arrays with these shapes, by path.

    A dimension that its mesh axes do not divide is replicated.
    """
    return {
        name: NamedSharding(
            mesh, divisible_spec(logical_to_mesh_axes(logical_axes[name], rules), shape, mesh)
        )
        for name, shape in shapes.items()
    }


def device_put(array: Any, sharding: NamedSharding) -> jax.Array:
    """Does ``jax.device_put``, even if some of the devices belong to other processes."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        local = np.asarray(array)
        return jax.make_array_from_callback(local.shape, sharding, lambda index: local[index])
    if array.sharding.is_equivalent_to(sharding, array.ndim):
        return array
    return _resharded(sharding)(array)


def stack(arrays: Sequence[Any]) -> Any:
    """Stacks arrays, or their shapes, that are sharded alike; the new first axis is not sharded."""
    first = arrays[0]
    sharding = first.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
    if isinstance(first, jax.ShapeDtypeStruct):
        shape = (len(arrays), *first.shape)
        return jax.ShapeDtypeStruct(shape, first.dtype, sharding=sharding)
    return _stacked(sharding)(arrays)


@cache
def _stacked(sharding: jax.sharding.Sharding) -> Any:
    return jax.jit(lambda arrays: jnp.stack(arrays), out_shardings=sharding)


def on_host(tree: Any) -> Any:
    """Copies the whole arrays of a tree to the memory of this process.

    With several processes, all must call it: arrays that are spread over them are gathered.
    """
    return jax.tree.map(_to_host, tree)


def _to_host(array: Any) -> np.ndarray:
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        if not array.is_fully_replicated and isinstance(array.sharding, NamedSharding):
            array = _resharded(NamedSharding(array.sharding.mesh, PartitionSpec()))(array)
        return np.asarray(array.addressable_data(0))
    return np.asarray(array)


@cache
def _resharded(sharding: NamedSharding) -> Any:
    return jax.jit(lambda array: array, out_shardings=sharding)


def divisible_spec(
    spec: PartitionSpec, shape: Sequence[int], mesh: jax.sharding.Mesh
) -> PartitionSpec:
    """Returns the spec without the mesh axes that do not divide their dimension."""
    entries = [
        entry if shape[i] % size_of(entry, mesh) == 0 else None for i, entry in enumerate(spec)
    ]
    return PartitionSpec(*entries)


def size_of(entry: Any, mesh: jax.sharding.Mesh) -> int:
    """Returns the number of shards into which an entry of a PartitionSpec splits a dimension."""
    names = (entry,) if isinstance(entry, str) else entry or ()
    return int(np.prod([mesh.shape[name] for name in names]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Partitioner:
    """A mesh and its rules; hashable, so that it can be a static argument of a jitted function."""

    mesh: jax.sharding.Mesh
    rules: Rules = dataclasses.field(default_factory=lambda: RULES)

    def __hash__(self) -> int:
        return hash((self.mesh, tuple(sorted(self.rules))))

    @property
    def is_single_device(self) -> bool:
        """Whether the mesh has a single device, so that nothing is sharded."""
        return bool(self.mesh.size == 1)

    @property
    def num_batch_shards(self) -> int:
        """The number of shards of a batch."""
        return size_of(logical_to_mesh_axes(("batch",), self.rules)[0], self.mesh)

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def sharding(self, axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
        """Returns the sharding of an array with these logical axes and this shape."""
        return NamedSharding(
            self.mesh, divisible_spec(logical_to_mesh_axes(axes, self.rules), shape, self.mesh)
        )

    def shard(
        self, arrays: Mapping[str, Any], logical_axes: Mapping[str, Sequence[str | None]]
    ) -> dict[str, jax.Array]:
        """Shards arrays, given by path, by their logical axes."""
        return shard(arrays, logical_axes, self.mesh, self.rules)

    def rows(self, batch_size: int) -> np.ndarray:
        """Returns the rows of a batch that are on this process's devices, in ascending order."""
        sharding = self.sharding(("batch",), (batch_size,))
        mine = np.zeros(batch_size, bool)
        for index in sharding.addressable_devices_indices_map((batch_size,)).values():
            mine[index or slice(None)] = True
        return np.flatnonzero(mine)

    def shard_rows(
        self, local: np.ndarray, axes: Sequence[str | None], *, rows: np.ndarray, batch_size: int
    ) -> jax.Array:
        """Builds the global array; ``local`` has this process's ``rows`` of the axis ``batch``."""
        axis = list(axes).index("batch")
        shape = (*local.shape[:axis], batch_size, *local.shape[axis + 1 :])

        def shard_at(index: Any) -> np.ndarray:
            wanted = np.arange(batch_size)[index[axis]]
            local_index = list(index)
            # The rows of a shard are consecutive, in the batch and in this process.
            first = int(np.searchsorted(rows, wanted[0]))
            local_index[axis] = slice(first, first + len(wanted))
            return local[tuple(local_index)]

        return jax.make_array_from_callback(shape, self.sharding(axes, shape), shard_at)

    def shard_batch(self, batch: Mapping[str, Any], axes: Sequence[str | None]) -> dict[str, Any]:
        """Shards by rows a batch that every process holds in full."""
        if self.is_single_device:
            return dict(batch)
        return {
            name: device_put(array, self.sharding(axes[: array.ndim], array.shape))
            for name, array in batch.items()
        }

    def replicate_arrays(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """Replicates the arrays that are not on a mesh yet; the others keep their sharding."""
        if self.is_single_device:
            return dict(arrays)

        def replicate_one(array: Any) -> Any:
            on_mesh = isinstance(array, jax.Array) and isinstance(array.sharding, NamedSharding)
            return array if on_mesh else device_put(array, self.replicated)

        return {name: replicate_one(array) for name, array in arrays.items()}


def spans_devices(partitioner: Partitioner | None) -> TypeGuard[Partitioner]:
    """Returns whether there is a mesh of more than one device."""
    return partitioner is not None and not partitioner.is_single_device


# Set by a jitted function while it is traced, because models do not know the mesh.
_TRACED: ContextVar[Partitioner | None] = ContextVar("partitioner of the function being traced")


@contextmanager
def activation_sharding(partitioner: Partitioner | None) -> Iterator[None]:
    """Makes ``with_logical_constraint`` use this mesh; the traced function enters it."""
    token = _TRACED.set(partitioner)
    try:
        yield
    finally:
        _TRACED.reset(token)


def with_logical_constraint(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Constrains the sharding of an activation; returns ``x`` itself if there is no mesh."""
    partitioner = _TRACED.get(None)
    if not spans_devices(partitioner):
        return x
    return jax.lax.with_sharding_constraint(x, partitioner.sharding(axes, x.shape))


def traced_partitioner() -> Partitioner | None:
    """Returns the partitioner of the traced function if its mesh has more than one device."""
    partitioner = _TRACED.get(None)
    return partitioner if spans_devices(partitioner) else None


def on_a_mesh() -> bool:
    """Returns whether the traced function runs on a mesh with more than one device."""
    return spans_devices(_TRACED.get(None))


def for_cpu() -> bool:
    """Returns whether the traced function runs on CPUs: those of its mesh, or JAX's default."""
    partitioner = _TRACED.get(None)
    if partitioner is not None:
        return partitioner.mesh.devices.flat[0].platform == "cpu"
    return jax.default_backend() == "cpu"


def num_shards(axis: str, size: int) -> int:
    """Returns into how many parts the traced function's mesh splits a logical axis of this size."""
    partitioner = _TRACED.get(None)
    if partitioner is None:
        return 1
    return size_of(partitioner.sharding((axis,), (size,)).spec[0], partitioner.mesh)


def replicate(tree: Any) -> Any:
    """Replicates the results of a sharded function, so that every process can read them."""
    partitioner = _TRACED.get(None)
    if not spans_devices(partitioner):
        return tree
    return jax.lax.with_sharding_constraint(tree, partitioner.replicated)
