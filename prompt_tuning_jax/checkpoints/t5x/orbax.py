"""The format of current T5X: an Orbax item ``state`` (OCDBT, or one folder per array).

Source: ``OrbaxCheckpointManagerInterface`` in t5x/checkpoints.py at cc342d4.  ``state/_METADATA``
lists the arrays; TensorStore reads them, by part.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from prompt_tuning_jax.checkpoints.location import ITEM, METADATA, CheckpointFolder
from prompt_tuning_jax.checkpoints.t5x.arrays import (
    ArrayLocation,
    OptimizerState,
    Stored,
    as_parameter,
    open_arrays,
    whole_number,
)
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.untrusted_input import read_json

_COMMIT = "commit_success.txt"
_TOP_METADATA = "_CHECKPOINT_METADATA"
# T5X's own version number of this format.
_VERSION = 3


def read_orbax(place: CheckpointFolder, metadata: bytes) -> Stored:
    """Opens a checkpoint with the given ``state/_METADATA``; arrays are read later, by part."""
    _require_finished(place)
    listed = _parse(place, metadata)
    leaves = dict(_leaves(place, listed))
    item = place.below(ITEM, of="its state")
    driver = "zarr3" if listed.get("use_zarr3") else "zarr"

    def where(path: tuple[str, ...]) -> ArrayLocation:
        name = ".".join(path)
        if listed.get("use_ocdbt", True):
            store: dict[str, Any] = {"driver": "ocdbt", "base": item, "path": f"{name}/"}
        else:
            store = place.below(f"{ITEM}/{name}", of="/".join(path))
        called = "/".join(path[1:] if path[0] == "target" else path)
        return ArrayLocation(
            path=f"{place.name}/{ITEM}", name=called, spec={"driver": driver, "kvstore": store}
        )

    step_path = ("state", "step")
    wanted = {p: where(p) for p, leaf in leaves.items() if p[0] == "target" and not leaf.empty}
    if not wanted or step_path not in leaves:
        raise UserError(
            f"{place.name}/{METADATA} lists no parameters or no step: it is not a T5X checkpoint"
        )
    arrays = open_arrays(
        {"/".join(path): spot for path, spot in {**wanted, step_path: where(step_path)}.items()},
        stored_bytes=place.stored_bytes(),
    )
    for path in wanted:
        array, part = arrays["/".join(path)], leaves[path].written
        if part is not None and (
            len(part) != len(array.shape)
            or any(n > size for n, size in zip(part, array.shape, strict=True))
        ):
            raise UserError(
                f"{array.where}: the array is {list(array.shape)}, but the index says {list(part)}"
            )
    state_paths = [path for path in leaves if path[0] == "state" and path != step_path]

    def open_state() -> OptimizerState:
        there = [path for path in state_paths if not leaves[path].empty]
        slots = open_arrays(
            {"/".join(path): where(path) for path in there}, stored_bytes=place.stored_bytes()
        )
        return {"/".join(path[1:]): slots.get("/".join(path)) for path in state_paths}

    return Stored(
        step=whole_number(arrays["state/step"], f"{place.name}/{METADATA}"),
        version=_VERSION,
        params={
            "/".join(path[1:]): as_parameter(arrays["/".join(path)], version=_VERSION)
            for path in wanted
        },
        state_names=tuple("/".join(path[1:]) for path in state_paths),
        open_state=open_state,
    )


def _require_finished(place: CheckpointFolder) -> None:
    """Raises UserError if Orbax's commit marks show that the save was not finished.

    Either the checkpoint and its item each have a mark, or neither has: Orbax writes none on file
    systems where renaming a folder is atomic.
    """
    unfinished = UserError(f"{place.name} is an unfinished save: use an earlier checkpoint")
    marks = [place.read(f"{folder}{_COMMIT}") is not None for folder in ("", f"{ITEM}/")]
    if any(marks) != all(marks):
        raise unfinished
    if not any(marks) and place.read(f"dataset/{_COMMIT}") is not None:
        raise unfinished
    top = place.read(_TOP_METADATA)
    if top is not None:
        times = read_json(top, of=f"{place.name}/{_TOP_METADATA} is damaged")
        if isinstance(times, dict) and times.get("commit_timestamp_nsecs", 0) is None:
            raise unfinished


def _parse(place: CheckpointFolder, metadata: bytes) -> dict[str, Any]:
    listed = read_json(metadata, of=f"{place.name}/{METADATA} is damaged, or not an Orbax index")
    if not isinstance(listed, dict) or not isinstance(listed.get("tree_metadata"), dict):
        raise UserError(f"{place.name}/{METADATA} lists no arrays: it is not a T5X checkpoint")
    return listed


@dataclass(frozen=True, kw_only=True)
class _Leaf:
    """``written`` is the shape that one process wrote (array or shard); None if not listed."""

    empty: bool
    written: tuple[int, ...] | None


def _leaves(
    place: CheckpointFolder, listed: dict[str, Any]
) -> Iterator[tuple[tuple[str, ...], _Leaf]]:
    for entry in listed["tree_metadata"].values():
        try:
            path = tuple(str(key["key"]) for key in entry["key_metadata"])
            value = entry["value_metadata"]
            written = value.get("write_shape")
            leaf = _Leaf(
                empty=value["value_type"] == "None",
                written=None if written is None else tuple(int(n) for n in written),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{place.name}/{METADATA} is damaged, or not an Orbax index") from error
        if any(part in ("", ".", "..") or "/" in part for part in path) or len(path) < 2:
            raise UserError(
                f"{place.name}/{METADATA}: {'/'.join(path)!r} is not a valid name of an array"
            )
        yield path, leaf
