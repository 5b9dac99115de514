"""T5X's own format, versions 2 and 3 (t5x/checkpoints.py at cc342d4).

A folder holds a msgpack index ``checkpoint`` and one zarr array per large leaf.  In the index a
leaf is the array itself, the TensorStore spec of a zarr array beside it, or None.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from prompt_tuning_jax.checkpoints.hf.flax_msgpack import scan_tree, whole_arrays
from prompt_tuning_jax.checkpoints.lazy import LazyArray, in_memory
from prompt_tuning_jax.checkpoints.t5x.location import Place, one_line
from prompt_tuning_jax.checkpoints.t5x.stored import (
    BFLOAT16,
    ArrayPlace,
    OptimizerState,
    Stored,
    as_parameter,
    open_arrays,
)
from prompt_tuning_jax.errors import UserError

INDEX = "checkpoint"
VERSIONS = (2, 3)
# Wherever it was written, the array is beside the index now.
_KNOWN_STORES = ("file", "gfile", "gcs", "s3")


def read_native(place: Place, index: bytes) -> Stored:
    """Opens a native checkpoint whose index is given; arrays are read later, by part."""
    version, tree = _parse(place, index)
    target, state = _entry(tree, "target", place), _entry(tree, "state", place)
    leaves = {name: leaf for name, leaf in _flat(target) if leaf is not None}
    if not leaves:
        raise UserError(f"{place.name}/{INDEX} lists no parameters: it is not a T5X checkpoint")
    state_leaves = dict(_flat(state)) if isinstance(state, Mapping) else {}
    step = state_leaves.pop("step", None)
    if step is None:
        raise UserError(f"{place.name}/{INDEX} has no step: it is not a T5X checkpoint")
    opened = _open(place, {"target": leaves, "state": {"step": step}})

    def open_state() -> OptimizerState:
        there = {name: leaf for name, leaf in state_leaves.items() if leaf is not None}
        arrays = _open(place, {"state": there})["state"]
        return {name: arrays.get(name) for name in state_leaves}

    return Stored(
        step=whole_number(opened["state"]["step"], f"{place.name}/{INDEX}"),
        version=version,
        params={
            name: as_parameter(array, version=version) for name, array in opened["target"].items()
        },
        state_names=tuple(state_leaves),
        open_state=open_state,
        inline=frozenset(
            f"{part}/{name}"
            for part, found in (("target", leaves), ("state", state_leaves))
            for name, leaf in found.items()
            if isinstance(leaf, np.ndarray)
        ),
    )


def whole_number(array: LazyArray, of: str) -> int:
    """The step; UserError if it is none."""
    if array.shape or array.dtype.kind not in "iu":
        raise UserError(f"{of} has no whole number as its step")
    return int(array.whole())


def _parse(place: Place, data: bytes) -> tuple[int, Mapping[str, Any]]:
    try:
        index = whole_arrays(scan_tree(memoryview(data)), _dtype)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{place.name}/{INDEX} is damaged or not a T5X index: {one_line(error)}"
        ) from error
    version = index.get("version", 0) if isinstance(index, Mapping) else None
    if not isinstance(version, int) or version not in VERSIONS:
        raise UserError(
            f"{place.name}/{INDEX} is T5X format version {version}; only versions 2 and 3 are read"
        )
    tree = _entry(index, "optimizer", place)
    if not isinstance(tree, Mapping):
        raise UserError(f"{place.name}/{INDEX}: 'optimizer' holds nothing: not a T5X checkpoint")
    return version, tree


def _dtype(name: str) -> np.dtype:
    if name == "bfloat16":
        return BFLOAT16
    dtype = np.dtype(name) if len(name) < 16 else None
    if dtype is None or dtype.kind not in "biuf" or dtype.hasobject:
        raise ValueError(f"an array of {name[:40]!r}")
    return dtype


def _entry(tree: Mapping[str, Any], name: str, place: Place) -> Any:
    if name not in tree:
        raise UserError(f"{place.name}/{INDEX} has no entry {name!r}: it is not a T5X checkpoint")
    return tree[name]


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, Mapping) and "driver" in leaf and "kvstore" in leaf


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, Mapping) or _is_spec(tree):
        yield prefix, tree
        return
    for name, child in tree.items():
        yield from _flat(child, f"{prefix}/{name}" if prefix else str(name))


def _open(place: Place, leaves: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, LazyArray]]:
    """Leaves of ``target`` and ``state`` by part and name, all opened at once."""
    inline: dict[str, LazyArray] = {}
    stored: dict[str, ArrayPlace] = {}
    for part, found in leaves.items():
        for name, leaf in found.items():
            # Messages call a parameter by its name, as everything else does.
            called = name if part == "target" else f"{part}/{name}"
            if isinstance(leaf, np.ndarray | int):
                where = f"{place.name}/{INDEX}: {called}"
                inline[f"{part}/{name}"] = in_memory(np.asarray(leaf), where=where)
            elif _is_spec(leaf):
                stored[f"{part}/{name}"] = _array_place(place, called, leaf)
            else:
                raise UserError(
                    f"{place.name}/{INDEX}: {called} is neither an array nor the place of one"
                )
    arrays = inline | open_arrays(stored, stored_bytes=place.stored_bytes())
    return {
        part: {name: arrays[f"{part}/{name}"] for name in found} for part, found in leaves.items()
    }


def _array_place(place: Place, name: str, spec: Mapping[str, Any]) -> ArrayPlace:
    """What is taken from a TensorStore spec: nothing else in it is trusted or passed on."""
    at = f"{place.name}/{INDEX}"
    store, metadata = spec["kvstore"], spec.get("metadata", {})
    if not isinstance(store, Mapping) or not isinstance(metadata, Mapping):
        raise UserError(f"{at}: the place of {name} is not readable")
    if spec["driver"] != "zarr":
        raise UserError(f"{at}: {name} is stored as {spec['driver']!r}, not zarr")
    if store.get("driver") not in _KNOWN_STORES:
        raise UserError(f"{at}: {name} is in a store of unknown driver {store.get('driver')!r}")
    # TensorStore before 0.1.14 had the path beside the store.
    path = store.get("path", spec.get("path"))
    shape, dtype = metadata.get("shape"), spec.get("dtype")
    try:
        known = None if shape is None else tuple(int(n) for n in shape)
    except (TypeError, ValueError) as error:
        raise UserError(f"{at}: the shape of {name} is not readable") from error
    return ArrayPlace(
        path=f"{place.name}/{path}".rstrip("/"),
        name=name,
        spec={"driver": "zarr", "kvstore": place.below(path, of=name)},
        shape=known,
        dtype=dtype if isinstance(dtype, str) else None,
    )
