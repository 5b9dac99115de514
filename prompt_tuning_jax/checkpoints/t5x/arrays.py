"""The arrays of a T5X checkpoint, read part by part through TensorStore.

``unscanned`` gives the parameters of scan-layers models a name per layer.  In such a model
(t5x/examples/scalable_t5/network.py) the layers of a stack are one array, stacked along axis 1 (or
0, ``param_scan_axis``), at ``encoder/encoder/...`` and ``decoder/decoder/...``; attention kernels
keep heads and head width apart; and every layer has its own relative position bias.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from prompt_tuning_jax.checkpoints import location
from prompt_tuning_jax.checkpoints.lazy_arrays import Index, LazyArray
from prompt_tuning_jax.checkpoints.parameters import RELPOS
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.typing import HostArray
from prompt_tuning_jax.untrusted_input import require_stored

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# By path below ``optimizer/state``; None for parameters that T5X's MultiOptimizer does not train.
OptimizerState: TypeAlias = dict[str, LazyArray | None]


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A checkpoint as one of the formats stores it; ``params`` has the names of the checkpoint.

    ``inline`` are the leaves inside the index itself, as ``target/...`` and ``state/...``.
    """

    step: int
    version: int
    params: dict[str, LazyArray]
    state_names: tuple[str, ...]
    open_state: Callable[[], OptimizerState]
    inline: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class ArrayLocation:
    """Where one array is, and its shape and dtype in the index (None if not given)."""

    path: str
    name: str
    spec: Mapping[str, Any]
    shape: tuple[int, ...] | None = None
    dtype: str | None = None


def open_arrays(
    places: Mapping[str, ArrayLocation], *, stored_bytes: int | None
) -> dict[str, LazyArray]:
    """Opens arrays concurrently, reading only their headers.

    ``stored_bytes`` is the size of the checkpoint on the disk, if it is known: headers that claim
    far more are refused.  Raises UserError for missing or damaged arrays, and for those that
    contradict the index.

    A chunk is decoded as a whole and can hold many parts of an array: a cache of the size of the
    largest array keeps the last chunks.
    """
    import tensorstore

    # Awaits all of them in turn, so that the first error does not leave others running.
    waiting = {
        name: tensorstore.open(
            {**place.spec, **_STRICT}, read=True, open=True, context=location.retries()
        )
        for name, place in places.items()
    }
    arrays = {name: _resolve(places[name], future) for name, future in waiting.items()}
    if stored_bytes is not None and arrays:
        claims = {name: _nbytes(array, array.shape) for name, array in arrays.items()}
        most = places[max(claims, key=claims.__getitem__)]
        of = f"{most.path} (its largest array is {most.name})"
        require_stored(sum(claims.values()), stored_bytes, of=of)
    largest = max((a.size * a.dtype.numpy_dtype.itemsize for a in arrays.values()), default=0)
    kept = location.retries(cached_bytes=min(largest, _MAX_CACHE_BYTES))
    # Opened again with a cache, without reading the headers again.
    cached = {
        name: tensorstore.open(
            array.spec(), read=True, open=True, assume_metadata=True, context=kept
        )
        for name, array in arrays.items()
    }
    return {name: _lazy(places[name], array.result()) for name, array in cached.items()}


# By default a missing chunk would be read as zeros.
_STRICT = {"fill_missing_data_reads": False, "recheck_cached_data": "open"}
_MAX_CACHE_BYTES = 1 << 29


_SMALL_CHUNK = 1 << 26  # bytes


def _nbytes(array: Any, shape: Iterable[int]) -> int:
    return prod(int(size) for size in shape) * int(array.dtype.numpy_dtype.itemsize)


def as_parameter(array: LazyArray, *, version: int) -> LazyArray:
    """Returns a parameter in its dtype: version 2 stores the bits of bfloat16 as uint16."""
    if version == 2 and array.dtype == np.uint16:
        return LazyArray(
            shape=array.shape,
            dtype=BFLOAT16,
            where=array.where,
            read=lambda index: np.ascontiguousarray(array.read(index)).view(BFLOAT16),
        )
    if array.dtype.kind != "f" and array.dtype != BFLOAT16:
        raise UserError(f"{array.where} holds {array.dtype}, which is not a type of parameters")
    return array


def whole_number(array: LazyArray, of: str) -> int:
    """Returns the step; UserError if the array is not one integer."""
    if array.shape or array.dtype.kind not in "iu":
        raise UserError(f"{of} has a step that is not an integer")
    return int(array.whole())


def _resolve(place: ArrayLocation, future: Any) -> Any:
    try:
        array = future.result()
    except Exception as error:  # TensorStore raises many types
        raise _failure(place, error) from error
    shape = tuple(array.shape)
    if place.shape is not None and shape != place.shape:
        raise UserError(
            f"{place.path} holds {list(shape)} for {place.name}, "
            f"but the index says {list(place.shape)}"
        )
    for chunk in (array.chunk_layout.read_chunk.shape, array.chunk_layout.write_chunk.shape):
        # TensorStore aborts the process if it cannot allocate a chunk.
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
            f"but the index says {place.dtype}"
        )
    return array


def _lazy(place: ArrayLocation, array: Any) -> LazyArray:
    shape = tuple(array.shape)

    def read(index: Index) -> HostArray:
        # TensorStore accepts neither slices beyond the end nor negative ones.
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


def _failure(place: ArrayLocation, error: Exception) -> UserError:
    damaged = UserError(
        f"{place.path} is damaged or incomplete for {place.name}: {location.one_line(error)}"
    )
    return location.unreachable(place.path, error) or damaged


STACKS = ("encoder", "decoder")
_NORM = re.compile(r"(encoder/encoder|decoder/decoder)/pre_\w+_layer_norm/scale")
_ATTENTION = re.compile(r".*attention/(query|key|value|out)/kernel")


def is_scanned(names: Mapping[str, object]) -> bool:
    """Returns whether these are the names of a scan-layers model."""
    return any(name.startswith(f"{stack}/{stack}/") for name in names for stack in STACKS)


def scan_axis(params: Mapping[str, LazyArray]) -> int:
    """Returns the axis along which layers are stacked.

    It is 1 unless the scales of norms say that it is 0.
    """
    width = next((p.shape[-1] for n, p in params.items() if n.endswith("embedder/embedding")), None)
    norms = [p.shape for name, p in params.items() if _NORM.fullmatch(name) and len(p.shape) == 2]
    return 0 if norms and all(D == width != L for L, D in norms) else 1


def unscanned(params: Mapping[str, LazyArray]) -> dict[str, LazyArray]:
    """Returns the same parameters with one name per layer and kernels [in, out].

    Only biases are read.

    Relative position biases that are equal in all layers of each stack become one per stack, as in
    T5.  If layers differ, all layers of both stacks keep their biases, at
    ``<stack>/layers_<i>/relpos_bias/rel_embedding``.
    """
    flat: dict[str, LazyArray] = {}
    layers: dict[str, int] = {}
    axis = scan_axis(params)
    for name, array in params.items():
        stack = name.split("/")[0]
        if stack not in STACKS or not name.startswith(f"{stack}/{stack}/"):
            flat[name] = array
            continue
        if len(array.shape) <= axis:
            raise UserError(f"{array.where}: {list(array.shape)} is not a stack of layers")
        count = layers.setdefault(stack, array.shape[axis])
        if count != array.shape[axis]:
            raise UserError(
                f"{array.where}: {array.shape[axis]} layers, but other arrays of the {stack} "
                f"have {count}"
            )
        rest = name.removeprefix(f"{stack}/{stack}/")
        for number in range(count):
            flat[f"{stack}/layers_{number}/{rest}"] = array.layer(number, axis=axis)
    flat = {name: _kernel(name, array) for name, array in flat.items()}
    if layers:  # otherwise the names already tell whether biases are per layer or per stack
        flat = _with_one_bias_per_stack(flat)
    return dict(sorted(flat.items()))


def _kernel(name: str, array: LazyArray) -> LazyArray:
    """Returns attention kernels [D,H,K] as [D,H*K], and output kernels [H,K,D] as [H*K,D]."""
    if len(array.shape) != 3 or not _ATTENTION.fullmatch(name):
        return array
    return joined(array, axis=0 if name.endswith("/out/kernel") else 1)


def joined(array: LazyArray, *, axis: int) -> LazyArray:
    """Returns ``axis`` merged with the next.

    A part reads the entries of ``axis`` that it overlaps.
    """
    outer, inner = array.shape[axis], array.shape[axis + 1]
    shape = (*array.shape[:axis], outer * inner, *array.shape[axis + 2 :])

    def read(index: Index) -> HostArray:
        start, stop, _ = index[axis].indices(outer * inner)
        stop = max(start, stop)
        first, last = start // inner, -(-stop // inner)
        touched = (*index[:axis], slice(first, last), slice(None), *index[axis + 1 :])
        part = array.read(touched)
        rows = part.reshape(*part.shape[:axis], (last - first) * inner, *part.shape[axis + 2 :])
        exact = slice(start - first * inner, stop - first * inner)
        return rows[(*(slice(None) for _ in range(axis)), exact)]

    return LazyArray(shape=shape, dtype=array.dtype, where=array.where, read=read)


def _with_one_bias_per_stack(params: dict[str, LazyArray]) -> dict[str, LazyArray]:
    """Returns the parameters with one bias per stack, if its layers have equal biases."""
    kept = dict(params)
    for stack in STACKS:
        of_layer = re.compile(rf"{stack}/layers_\d+/{RELPOS}")
        biases = [kept.pop(name) for name in params if of_layer.fullmatch(name)]
        if not biases:
            continue
        first, *others = (array.whole() for array in biases)
        if not all(np.array_equal(first, other) for other in others):
            return params
        kept[f"{stack}/{RELPOS}"] = biases[0]
    return kept
