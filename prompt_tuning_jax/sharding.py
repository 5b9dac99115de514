"""The table from logical axes to mesh axes, the mesh, and the shardings that follow from both."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from prompt_tuning_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "model")

# THE table.  A logical axis that is not here is a mistake; None means replicated.
RULES: Mapping[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "length": None,
    "embed": "fsdp",
    "heads": "model",
    "kv": None,
    "joined_kv": "model",  # heads x kv in one dimension, as T5X lays its kernels out
    "mlp": "model",
    "vocab": "model",
    "relpos_buckets": None,
    "norm": None,
    "prompt": None,
    "prompt_embed": None,
    "tasks": None,
    "ensemble": None,
}


def make_mesh(
    *, data: int = -1, fsdp: int = 1, model: int = 1, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
    """A mesh over all devices; one of the sizes may be -1 and takes what is left.

    Raises UserError when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, model]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"mesh sizes {sizes} must be positive, and at most one may be -1")
    known = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(len(devices) // known, 1)
    if int(np.prod(sizes)) != len(devices):
        shape = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
        raise UserError(f"mesh {shape} does not fit {len(devices)} devices")
    return jax.make_mesh(
        tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=tuple(devices)
    )


def spec_of(
    axes: Sequence[str | None], rules: Mapping[str, str | tuple[str, ...] | None] = RULES
) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes; each mesh axis is used at most once.

    Raises KeyError for a logical axis that the table does not know.
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
) -> dict[str, jax.Array]:
    """Every array, by path, laid out over the mesh by the table; nothing moves that is in place."""
    if mesh.size == 1:
        return dict(arrays)
    layouts = shardings_of(
        {name: array.shape for name, array in arrays.items()}, logical_axes, mesh
    )
    return {name: jax.device_put(array, layouts[name]) for name, array in arrays.items()}


def shardings_of(
    shapes: Mapping[str, Sequence[int]],
    logical_axes: Mapping[str, Sequence[str | None]],
    mesh: jax.sharding.Mesh,
) -> dict[str, NamedSharding]:
    """How the table lays arrays of these shapes, by path, out over the mesh.

    A dimension that its mesh axes do not divide is kept whole.
    """
    layouts = {}
    for name, shape in shapes.items():
        spec = [
            entry if shape[i] % _size(entry, mesh) == 0 else None
            for i, entry in enumerate(spec_of(logical_axes[name]))
        ]
        layouts[name] = NamedSharding(mesh, PartitionSpec(*spec))
    return layouts


def _size(entry: str | tuple[str, ...] | None, mesh: jax.sharding.Mesh) -> int:
    names = (entry,) if isinstance(entry, str) else entry or ()
    return int(np.prod([mesh.shape[name] for name in names]))
