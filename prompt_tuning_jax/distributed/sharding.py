"""The table from logical axes to mesh axes, the mesh, and the layouts that follow from both."""

from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from prompt_tuning_jax.config.field_syntax import MESH_AXES, parse_rules
from prompt_tuning_jax.errors import UserError

Rules: TypeAlias = Mapping[str, str | tuple[str, ...] | None]

# THE table.  A logical axis that is not here is a mistake; None means replicated.
RULES: Rules = MappingProxyType(
    {
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
)


def with_rules(texts: Sequence[str]) -> Rules:
    """The table with a user's rules in place of, or beside, its own."""
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
    """A mesh over all devices; one of the sizes may be -1 and takes what is left.

    ``data``, ``fsdp`` and ``model`` are sizes within a slice (or a host, where devices are in no
    slices), and the ``dcn`` ones numbers of slices; an axis of the mesh is as long as both
    together, its slices one after another.  With all of these 1, devices are taken as they come.
    Raises UserError when the sizes do not multiply to the number of devices.
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
    """Devices of one slice next to each other; without slices a process takes the place of one."""
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


def spec_of(axes: Sequence[str | None], rules: Rules = RULES) -> PartitionSpec:
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
    rules: Rules = RULES,
) -> dict[str, jax.Array]:
    """Every array, by path, laid out over the mesh by the table; nothing moves that is in place.

    With several processes each must hold the whole array, or all of them the same global one.
    """
    if mesh.size == 1:
        return dict(arrays)
    shapes = {name: array.shape for name, array in arrays.items()}
    layouts = shardings_of(shapes, logical_axes, mesh, rules)
    return {name: put(array, layouts[name]) for name, array in arrays.items()}


def shardings_of(
    shapes: Mapping[str, Sequence[int]],
    logical_axes: Mapping[str, Sequence[str | None]],
    mesh: jax.sharding.Mesh,
    rules: Rules = RULES,
) -> dict[str, NamedSharding]:
    """How the table lays arrays of these shapes, by path, out over the mesh.

    A dimension that its mesh axes do not divide is kept whole.
    """
    return {
        name: NamedSharding(mesh, fitting(spec_of(logical_axes[name], rules), shape, mesh))
        for name, shape in shapes.items()
    }


def put(array: Any, partitioner: NamedSharding) -> jax.Array:
    """An array laid out anew, where some of the devices may belong to other processes."""
    if partitioner.is_fully_addressable:
        return jax.device_put(array, partitioner)
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        held = np.asarray(array)
        return jax.make_array_from_callback(held.shape, partitioner, lambda index: held[index])
    if array.sharding.is_equivalent_to(partitioner, array.ndim):
        return array
    return _moved(partitioner)(array)


def on_host(tree: Any) -> Any:
    """The arrays of a tree in this process's memory, whole.

    With several processes all must call it: what none of them holds whole is gathered.
    """
    return jax.tree.map(_to_host, tree)


def _to_host(array: Any) -> np.ndarray:
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        if not array.is_fully_replicated and isinstance(array.sharding, NamedSharding):
            array = _moved(NamedSharding(array.sharding.mesh, PartitionSpec()))(array)
        return np.asarray(array.addressable_data(0))
    return np.asarray(array)


@cache
def _moved(partitioner: NamedSharding) -> Any:
    return jax.jit(lambda array: array, out_shardings=partitioner)


def fitting(spec: PartitionSpec, shape: Sequence[int], mesh: jax.sharding.Mesh) -> PartitionSpec:
    """The spec with every dimension whole that its mesh axes do not divide."""
    entries = [
        entry if shape[i] % size_of(entry, mesh) == 0 else None for i, entry in enumerate(spec)
    ]
    return PartitionSpec(*entries)


def size_of(entry: Any, mesh: jax.sharding.Mesh) -> int:
    """How many parts an entry of a PartitionSpec makes of its dimension."""
    names = (entry,) if isinstance(entry, str) else entry or ()
    return int(np.prod([mesh.shape[name] for name in names]))
