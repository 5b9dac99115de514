"""Writes checkpoints in T5X's own format, version 3, which T5X restores (t5x/checkpoints.py)."""

import itertools
import math
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from prompt_tuning_jax.checkpoints.lazy_arrays import LazyArray, in_memory
from prompt_tuning_jax.checkpoints.location import INDEX, one_line
from prompt_tuning_jax.checkpoints.t5x.arrays import BFLOAT16, OptimizerState
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.storage import flush_to_disk
from prompt_tuning_jax.typing import Array, HostArray

AnyArray: TypeAlias = LazyArray | HostArray | Array

_VERSION = 3
_CHUNK_BYTES = 64 * 1024 * 1024
_NAME = re.compile(r"[\w-]+(/[\w-]+)*", re.ASCII)
# T5X factors the second moment of a prompt of this size in both directions (t5x/adafactor.py).
_FACTORED_FROM = 128


def write_t5x(
    folder: str | Path,
    params: Mapping[str, AnyArray],
    *,
    step: int,
    trained: Mapping[str, AnyArray] | None = None,
    state: Mapping[str, AnyArray | None] | None = None,
    inline: Collection[str] = (),
) -> Path:
    """Writes ``checkpoint_<step>`` into ``folder``, keeping dtypes, and returns its path.

    ``params`` are by name, and so are the ``trained`` arrays of a method, such as a prompt [P,D] at
    ``PROMPT``.  ``state`` is the optimizer's, by path (``param_states/...``).  Without ``state``, a
    checkpoint with trained arrays gets the initial state of T5X's prompt tuning (zeros for these,
    nothing for the rest), and one without them gets none, like the models that T5X saves for
    inference.  Leaves named in ``inline`` (``target/...``, ``state/...``) are stored inside the
    index.  The checkpoint is written to a temporary folder and renamed, so it is complete or
    absent.  Raises UserError, also if the step exists already.
    """
    if isinstance(step, bool) or not isinstance(step, int | np.integer) or not 0 <= step < 2**31:
        raise UserError(
            f"the step of a T5X checkpoint is {step!r}; it must be an integer of at least 0"
        )
    target = {name: _lazy(name, array) for name, array in params.items()}
    added = {name: _lazy(name, array) for name, array in (trained or {}).items()}
    target |= added
    if added and state is None:
        state = _first_state(target, added)
    state = {} if state is None else state
    optimizer = {name: None if a is None else _lazy(name, a) for name, a in state.items()}
    _require_names(target)
    _require_names(optimizer)
    if "step" in optimizer:
        raise UserError("the optimizer's state has an array 'step': pass it as the argument step")
    final = Path(folder) / f"checkpoint_{step}"
    if os.path.lexists(final):
        raise UserError(f"{final} exists already: remove it, or write to another folder")
    # T5X's name for unfinished saves, which it and this package ignore.
    temporary = final.with_name(f"{final.name}.tmp-{os.getpid()}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        _write(temporary, target, optimizer, step=int(step), inline=inline)
        for file in temporary.rglob("*"):
            if file.is_file():
                flush_to_disk(file)
        os.rename(temporary, final)
    except OSError as error:
        raise UserError(f"cannot write {final}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def _write(
    folder: Path,
    target: Mapping[str, LazyArray],
    optimizer: OptimizerState,
    *,
    step: int,
    inline: Collection[str],
) -> None:
    from flax import serialization

    leaves: dict[str, Any] = {"state/step": np.array(step, np.int32)}
    for name, array in target.items():
        leaves[f"target/{name}"] = _leaf(folder, f"target/{name}", array, inline=inline)
    for name, slot in optimizer.items():
        full = f"state/{name}"
        if slot is None:
            leaves[full] = None
        elif (of := target.get(_parameter_of(name))) is None or of.shape != slot.shape:
            # T5X stores small slots, whose shape differs from their parameter's, in the index.
            leaves[full] = slot.whole()
        else:
            leaves[full] = _leaf(folder, full, slot, inline=inline)
    index = {"version": _VERSION, "optimizer": _nested(leaves)}
    (folder / INDEX).write_bytes(serialization.msgpack_serialize(index, in_place=True))


def _parameter_of(name: str) -> str:
    """``param_states/<parameter>/<slot>`` -> ``<parameter>``."""
    return name.removeprefix("param_states/").rpartition("/")[0]


def _leaf(folder: Path, name: str, array: LazyArray, *, inline: Collection[str]) -> Any:
    """Returns the array itself, or writes it and returns the TensorStore spec for the index."""
    if name in inline:
        return array.whole()
    import tensorstore

    file = name.replace("/", ".")
    chunks = _chunk_shape(array)
    spec = {
        "driver": "zarr",
        "dtype": array.dtype.name,
        "kvstore": {"driver": "file", "path": f"{file}/"},
        "metadata": {
            "chunks": list(chunks),
            "compressor": {"id": "gzip", "level": 1},
            "shape": list(array.shape),
        },
    }
    here = {**spec, "kvstore": {"driver": "file", "path": f"{folder / file}/"}}
    try:
        stored = tensorstore.open(here, create=True).result()
    except Exception as error:  # TensorStore maps its codes to many kinds
        raise UserError(f"{array.where}: cannot be written as zarr: {one_line(error)}") from error
    for part in _grid(array.shape, chunks):
        block = array.read(part)
        try:
            (stored[part] if part else stored).write(block).result()
        except Exception as error:
            raise OSError(f"{file}: {one_line(error)}") from error
    return spec


def _chunk_shape(array: LazyArray) -> tuple[int, ...]:
    """Returns the shape of chunks of at most 64 MiB.

    As in T5X, it has the largest divisors, and the longest axis is split first.
    """
    most = _CHUNK_BYTES // array.dtype.itemsize
    chunks = list(array.shape)
    while math.prod(chunks) > most:
        axis = chunks.index(max(chunks))
        size = array.shape[axis]
        chunks[axis] = next(n for n in range(chunks[axis] - 1, 0, -1) if size % n == 0)
    return tuple(chunks)


def _grid(shape: tuple[int, ...], chunks: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    starts = (range(0, size, chunk) for size, chunk in zip(shape, chunks, strict=True))
    for corner in itertools.product(*starts):
        yield tuple(slice(at, at + chunk) for at, chunk in zip(corner, chunks, strict=True))


def _lazy(name: str, array: AnyArray) -> LazyArray:
    lazy = array if isinstance(array, LazyArray) else in_memory(np.asarray(array), where=name)
    if lazy.dtype.kind not in "fiu" and lazy.dtype != BFLOAT16:
        raise UserError(f"{lazy.where}: T5X does not store arrays of {lazy.dtype}")
    if 0 in lazy.shape:
        raise UserError(f"{lazy.where}: an array of shape {list(lazy.shape)} is empty")
    return lazy


def _first_state(
    target: Mapping[str, LazyArray], trained: Collection[str]
) -> dict[str, AnyArray | None]:
    """Returns Adafactor's initial state, for the trained parameters only (t5x/adafactor.py)."""
    state: dict[str, AnyArray | None] = {
        f"param_states/{name}": None for name in target if name not in trained
    }
    for name in trained:
        shape = target[name].shape
        factored = len(shape) == 2 and min(shape) >= _FACTORED_FROM
        shorter, longer = min(shape), max(shape)
        shapes = {
            "m": (1,),
            "v": (1,) if factored else shape,
            "v_row": (shorter,) if factored else (1,),
            "v_col": (longer,) if factored else (1,),
        }
        for slot, of_slot in shapes.items():
            state[f"param_states/{name}/{slot}"] = np.zeros(of_slot, np.float32)
    return state


def _require_names(arrays: Mapping[str, object]) -> None:
    if not all(_NAME.fullmatch(name) for name in arrays):
        wrong = next(name for name in arrays if not _NAME.fullmatch(name))
        raise UserError(
            f"{wrong!r} is not a valid array name: use letters, digits, _ and -, between slashes"
        )
    for name in arrays:
        parts = name.split("/")
        if within := next(
            (p for p in itertools.accumulate(parts, _join) if p in arrays and p != name), None
        ):
            raise UserError(f"{within} cannot be an array and contain {name}")


def _join(path: str, part: str) -> str:
    return f"{path}/{part}"


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the paths as a nested tree, sorted by name, as T5X does."""
    tree: dict[str, Any] = {}
    for path in sorted(leaves, key=lambda path: path.split("/")):
        *parents, name = path.split("/")
        at = tree
        for parent in parents:
            at = at.setdefault(parent, {})
        at[name] = leaves[path]
    return tree
