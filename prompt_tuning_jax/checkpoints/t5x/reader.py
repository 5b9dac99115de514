"""Opens checkpoints that T5X wrote, in each of its formats, under one set of names.

T5X's native format, versions 2 and 3 (t5x/checkpoints.py at cc342d4), is read here: a folder holds
a msgpack index ``checkpoint`` and one zarr array per large leaf.  In the index a leaf is the array
itself, the TensorStore spec of a zarr array beside it, or None.  Older checkpoints are such an
index alone, in a file.  ``orbax`` reads the newer format.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from prompt_tuning_jax.checkpoints.hf.flax_msgpack import scan_tree, whole_arrays
from prompt_tuning_jax.checkpoints.lazy_arrays import LazyArray, in_memory
from prompt_tuning_jax.checkpoints.location import INDEX, ITEM, METADATA, CheckpointFolder, one_line
from prompt_tuning_jax.checkpoints.t5x.arrays import (
    BFLOAT16,
    ArrayLocation,
    OptimizerState,
    Stored,
    as_parameter,
    is_scanned,
    open_arrays,
    unscanned,
    whole_number,
)
from prompt_tuning_jax.checkpoints.t5x.orbax import read_orbax
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.typing import HostArray
from prompt_tuning_jax.untrusted_input import require_whole

VERSIONS = (2, 3)
# Where the array was written; now it is beside the index.
_KNOWN_STORES = ("file", "gfile", "gcs", "s3")


def read_native(place: CheckpointFolder, index: bytes | memoryview) -> Stored:
    """Opens a native checkpoint with the given index; arrays are read later, by part."""
    version, tree = _parse(place, index)
    target, state = _entry(tree, "target", place), _entry(tree, "state", place)
    leaves = {name: leaf for name, leaf in _flat(target) if leaf is not None}
    if not leaves:
        raise UserError(f"{place.name}/{INDEX} lists no parameters: it is not a T5X checkpoint")
    state_leaves = dict(_flat(state)) if isinstance(state, Mapping) else {}
    step = state_leaves.pop("step", None)
    if step is None:
        raise UserError(f"{place.name}/{INDEX} has no step: it is not a T5X checkpoint")
    arrays = _open(place, {"target": leaves, "state": {"step": step}})

    def open_state() -> OptimizerState:
        there = {name: leaf for name, leaf in state_leaves.items() if leaf is not None}
        slots = _open(place, {"state": there})["state"]
        return {name: slots.get(name) for name in state_leaves}

    return Stored(
        step=whole_number(arrays["state"]["step"], f"{place.name}/{INDEX}"),
        version=version,
        params={
            name: as_parameter(array, version=version) for name, array in arrays["target"].items()
        },
        state_names=tuple(state_leaves),
        open_state=open_state,
        inline=frozenset(
            f"{part}/{name}"
            for part, part_leaves in (("target", leaves), ("state", state_leaves))
            for name, leaf in part_leaves.items()
            if isinstance(leaf, np.ndarray)
        ),
    )


def _parse(place: CheckpointFolder, data: bytes | memoryview) -> tuple[int, Mapping[str, Any]]:
    try:
        index = whole_arrays(scan_tree(memoryview(data)), _dtype)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{place.name}/{INDEX} is damaged, or not a T5X index: {one_line(error)}"
        ) from error
    version = index.get("version", 0) if isinstance(index, Mapping) else None
    if not isinstance(version, int) or version not in VERSIONS:
        raise UserError(
            f"{place.name}/{INDEX} is T5X format version {version}; only versions 2 and 3 are read"
        )
    tree = _entry(index, "optimizer", place)
    if not isinstance(tree, Mapping):
        raise UserError(f"{place.name}/{INDEX}: 'optimizer' is empty: it is not a T5X checkpoint")
    return version, tree


def _dtype(name: str) -> np.dtype:
    if name == "bfloat16":
        return BFLOAT16
    dtype = np.dtype(name) if len(name) < 16 else None
    if dtype is None or dtype.kind not in "biuf" or dtype.hasobject:
        raise ValueError(f"an array of {name[:40]!r}")
    return dtype


def _entry(tree: Mapping[str, Any], name: str, place: CheckpointFolder) -> Any:
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


def _open(
    place: CheckpointFolder, leaves: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, LazyArray]]:
    """Opens all leaves of ``target`` and ``state`` at once; returns them by part and name."""
    inline: dict[str, LazyArray] = {}
    stored: dict[str, ArrayLocation] = {}
    for part, part_leaves in leaves.items():
        for name, leaf in part_leaves.items():
            # Messages use the same parameter names as everything else.
            called = name if part == "target" else f"{part}/{name}"
            if isinstance(leaf, np.ndarray | int):
                where = f"{place.name}/{INDEX}: {called}"
                inline[f"{part}/{name}"] = in_memory(np.asarray(leaf), where=where)
            elif _is_spec(leaf):
                stored[f"{part}/{name}"] = _array_place(place, called, leaf)
            else:
                raise UserError(
                    f"{place.name}/{INDEX}: {called} is neither an array nor the location of one"
                )
    arrays = inline | open_arrays(stored, stored_bytes=place.stored_bytes())
    return {
        part: {name: arrays[f"{part}/{name}"] for name in part_leaves}
        for part, part_leaves in leaves.items()
    }


def _array_place(place: CheckpointFolder, name: str, spec: Mapping[str, Any]) -> ArrayLocation:
    """Returns the location from a TensorStore spec; nothing else in the spec is trusted."""
    at = f"{place.name}/{INDEX}"
    store, metadata = spec["kvstore"], spec.get("metadata", {})
    if not isinstance(store, Mapping) or not isinstance(metadata, Mapping):
        raise UserError(f"{at}: the location of {name} is not readable")
    if spec["driver"] != "zarr":
        raise UserError(f"{at}: {name} is stored as {spec['driver']!r}, not zarr")
    if store.get("driver") not in _KNOWN_STORES:
        raise UserError(f"{at}: {name} is in a store of unknown driver {store.get('driver')!r}")
    # Before TensorStore 0.1.14 the path was beside the store.
    path = store.get("path", spec.get("path"))
    shape, dtype = metadata.get("shape"), spec.get("dtype")
    try:
        known = None if shape is None else tuple(int(n) for n in shape)
    except (TypeError, ValueError) as error:
        raise UserError(f"{at}: the shape of {name} is not readable") from error
    return ArrayLocation(
        path=f"{place.name}/{path}".rstrip("/"),
        name=name,
        spec={"driver": "zarr", "kvstore": place.below(path, of=name)},
        shape=known,
        dtype=dtype if isinstance(dtype, str) else None,
    )


Layout = Literal["t5x", "t5x_orbax"]


@dataclass(frozen=True, kw_only=True)
class T5XCheckpoint:
    """An open checkpoint, of which only the index and headers have been read.

    ``params`` has one name per layer, also for scan-layers models (``arrays.unscanned``); a trained
    prompt is at ``PROMPT``.  ``stored`` has the same arrays under the checkpoint's names:
    ``write_t5x`` writes an identical checkpoint from ``stored``, ``open_state()`` and ``inline``.
    """

    step: int
    layout: Layout
    version: int
    scanned: bool
    params: dict[str, LazyArray]
    stored: dict[str, LazyArray]
    state_names: tuple[str, ...]
    open_state: Callable[[], OptimizerState]
    inline: frozenset[str]


def open_t5x(folder: str | Path) -> T5XCheckpoint:
    """Opens the checkpoint in a folder or file, or at a ``gs://`` or ``s3://`` address.

    Raises UserError for a checkpoint that is missing, damaged, unfinished or of another version, or
    that refers to files outside the folder.  Reading the arrays raises UserError for missing and
    damaged chunks.
    """
    place = CheckpointFolder.of(folder)
    layout: Layout
    # TensorStore aborts the process if it cannot allocate memory for a file.
    if place.root is not None and place.file is None:
        require_whole(place.root)
    if (index := place.read_index()) is not None:
        layout, stored = "t5x", read_native(place, index)
    elif (metadata := place.read(METADATA)) is not None:
        layout, stored = "t5x_orbax", read_orbax(place, metadata)
    else:
        raise UserError(_nothing_in(place))
    return T5XCheckpoint(
        step=stored.step,
        layout=layout,
        version=stored.version,
        scanned=is_scanned(stored.params),
        params=unscanned(stored.params),
        stored=stored.params,
        state_names=stored.state_names,
        open_state=stored.open_state,
        # A single file holds all arrays, which a folder's index should not.
        inline=stored.inline if place.file is None else frozenset(),
    )


def read_t5x(folder: str | Path) -> dict[str, HostArray]:
    """Returns all parameters of a checkpoint by name, in memory, in the stored dtypes."""
    return {name: array.whole() for name, array in open_t5x(folder).params.items()}


def _nothing_in(place: CheckpointFolder) -> str:
    none = f"{place.name} has no index file {INDEX!r}"
    if place.root is None:
        return f"{none} and no {METADATA}; is it a T5X checkpoint?"
    if (place.root / ITEM).is_dir():
        return f"{place.name} has no {METADATA}: the copy is incomplete, or its format is unknown"
    inside = sorted(p.name for p in place.root.glob("checkpoint_*"))
    if inside:
        return f"{none}; did you mean {Path(place.name) / inside[-1]}?"
    if any(place.root.glob("target.*")) or any(place.root.glob(f"{ITEM}.orbax-checkpoint-tmp*")):
        return f"{none}, which is written last: the save or the copy is incomplete"
    return f"{none}; is it a T5X checkpoint?"
