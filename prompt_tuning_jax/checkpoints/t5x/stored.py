"""The arrays of a T5X checkpoint as they are stored, read part by part through TensorStore."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from prompt_tuning_jax.checkpoints import bucket
from prompt_tuning_jax.checkpoints.lazy import Index, LazyArray
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.typing import HostArray
from prompt_tuning_jax.untrusted_input import require_stored

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# By their path below ``optimizer/state``; None where T5X's MultiOptimizer trains nothing.
OptimizerState: TypeAlias = dict[str, LazyArray | None]


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What a reader of one layout finds; ``params`` has the names that are in the checkpoint.

    ``inline`` are the leaves that lie in the index itself, as ``target/...`` and ``state/...``.
    """

    step: int
    version: int
    params: dict[str, LazyArray]
    state_names: tuple[str, ...]
    open_state: Callable[[], OptimizerState]
    inline: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class ArrayPlace:
    """Where one array is, and what the index says about it (None: nothing)."""

    path: str
    name: str
    spec: Mapping[str, Any]
    shape: tuple[int, ...] | None = None
    dtype: str | None = None


def open_arrays(
    places: Mapping[str, ArrayPlace], *, stored_bytes: int | None
) -> dict[str, LazyArray]:
    """Opens all at once, which reads their headers only; UserError for what is not as it should.

    ``stored_bytes`` is what the checkpoint takes on the disk, if that is known: headers that claim
    far more are refused.

    Chunks are decoded as a whole, and many parts of an array can lie in one: those read last are
    kept, as much as the largest of the arrays.
    """
    import tensorstore

    # The first error must not leave the others running: they are waited for one by one.
    waiting = {
        name: tensorstore.open(
            {**place.spec, **_STRICT}, read=True, open=True, context=bucket.retries()
        )
        for name, place in places.items()
    }
    opened = {name: _opened(places[name], future) for name, future in waiting.items()}
    if stored_bytes is not None and opened:
        claims = {name: _nbytes(array, array.shape) for name, array in opened.items()}
        most = places[max(claims, key=claims.__getitem__)]
        of = f"{most.path} (its largest array is {most.name})"
        require_stored(sum(claims.values()), stored_bytes, of=of)
    largest = max((a.size * a.dtype.numpy_dtype.itemsize for a in opened.values()), default=0)
    kept = bucket.retries(cached_bytes=min(largest, _MOST_CACHED))
    # Again, without reading the headers again.
    cached = {
        name: tensorstore.open(
            array.spec(), read=True, open=True, assume_metadata=True, context=kept
        )
        for name, array in opened.items()
    }
    return {name: _lazy(places[name], array.result()) for name, array in cached.items()}


# Otherwise a lost chunk would be read as zeros.
_STRICT = {"fill_missing_data_reads": False, "recheck_cached_data": "open"}
_MOST_CACHED = 1 << 29


_SMALL_CHUNK = 1 << 26  # bytes


def _nbytes(array: Any, shape: Iterable[int]) -> int:
    return prod(int(size) for size in shape) * int(array.dtype.numpy_dtype.itemsize)


def as_parameter(array: LazyArray, *, version: int) -> LazyArray:
    """A parameter by its number type: version 2 stored the bits of bfloat16 as uint16."""
    if version == 2 and array.dtype == np.uint16:
        return LazyArray(
            shape=array.shape,
            dtype=BFLOAT16,
            where=array.where,
            read=lambda index: np.ascontiguousarray(array.read(index)).view(BFLOAT16),
        )
    if array.dtype.kind != "f" and array.dtype != BFLOAT16:
        raise UserError(f"{array.where} holds {array.dtype}, which are no parameters")
    return array


def _opened(place: ArrayPlace, future: Any) -> Any:
    try:
        array = future.result()
    except Exception as error:  # TensorStore maps its codes to many kinds
        raise _failure(place, error) from error
    shape = tuple(array.shape)
    if place.shape is not None and shape != place.shape:
        raise UserError(
            f"{place.path} holds {list(shape)} for {place.name}, "
            f"and the index says {list(place.shape)}"
        )
    for chunk in (array.chunk_layout.read_chunk.shape, array.chunk_layout.write_chunk.shape):
        # TensorStore ends the process where the memory for a chunk cannot be had.
        if chunk is not None and _nbytes(array, chunk) > max(
            _SMALL_CHUNK, 2 * _nbytes(array, shape)
        ):
            raise UserError(
                f"{place.path} has chunks of {list(chunk)} for {place.name}, which is "
                f"{list(shape)}: it is damaged"
            )
    if place.dtype is not None and array.dtype.name != place.dtype:
        raise UserError(
            f"{place.path} holds {array.dtype.name} for {place.name}, "
            f"and the index says {place.dtype}"
        )
    return array


def _lazy(place: ArrayPlace, array: Any) -> LazyArray:
    shape = tuple(array.shape)

    def read(index: Index) -> HostArray:
        # TensorStore takes no slice beyond the end and none that counts from it.
        bounds = (part.indices(size) for part, size in zip(index, shape, strict=True))
        part = tuple(slice(start, max(start, stop)) for start, stop, _ in bounds)
        try:
            return np.asarray((array[part] if part else array).read().result())
        except Exception as error:
            raise _failure(place, error) from error

    return LazyArray(
        shape=shape,
        dtype=np.dtype(array.dtype.numpy_dtype),
        where=f"{place.path} ({place.name})",
        read=read,
    )


def _failure(place: ArrayPlace, error: Exception) -> UserError:
    damaged = UserError(
        f"{place.path} is damaged or incomplete for {place.name}: {bucket.one_line(error)}"
    )
    return bucket.unreachable(place.path, error) or damaged
