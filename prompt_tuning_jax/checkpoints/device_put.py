"""Puts the arrays of a checkpoint onto devices, each device's part read by itself.

The host holds one part at a time, as it is stored and as it is laid out for the device, and never
the model.  A process reads what its own devices hold and nothing else.
"""

from collections.abc import Callable, Iterable, Mapping

import jax
import ml_dtypes
import numpy as np

from prompt_tuning_jax.checkpoints.lazy import Index, LazyArray
from prompt_tuning_jax.checkpoints.progress import Report, progress
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.typing import Array, DType, HostArray

# What XLA wants of host memory that it takes as it is, on CPU.
_ALIGNMENT = 64
# By dtype: unsigned integers of its width, and the bits of its exponent.
_EXPONENTS: dict[np.dtype, tuple[np.dtype, np.unsignedinteger]] = {
    np.dtype(np.float32): (np.dtype(np.uint32), np.uint32(0x7F800000)),
    np.dtype(np.float16): (np.dtype(np.uint16), np.uint16(0x7C00)),
    np.dtype(ml_dtypes.bfloat16): (np.dtype(np.uint16), np.uint16(0x7F80)),
}
_LOOKED_AT = 2**16


def place(
    params: Mapping[str, LazyArray],
    *,
    dtype: DType,
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
    title: str = "reading",
    finish: Callable[[str, Array], Mapping[str, Array]] | None = None,
    as_stored: Callable[[str], bool] = lambda name: False,
) -> dict[str, Array]:
    """Every array, by name, as ``dtype``, laid out by its sharding.

    Without ``shardings`` each is whole on the default device.  A part that several devices hold is
    read once.  ``finish`` makes of each placed array what is kept in its place, by name, before the
    next is read; those that are ``as_stored`` it gets in the dtype that they are stored in.  Raises
    UserError for what cannot be read.
    """
    placed = {}
    with progress(title, total=sum(array.nbytes for array in params.values())) as report:
        # Layers of one stored stack follow each other: a chunk is then still at hand.
        for name, array in sorted(params.items(), key=lambda item: item[1].where):
            kind = np.dtype(array.dtype if as_stored(name) else dtype)
            if shardings is None:
                whole = tuple(slice(0, size) for size in array.shape)
                one = jax.device_put(read_as(array, whole, kind)).block_until_ready()
                report(name, array.nbytes)
            else:
                one = _sharded(name, array, kind, shardings[name], report=report)
            parts = {name: one} if finish is None else finish(name, one)
            placed[name] = {part: _finished([x])[0] for part, x in parts.items()}
    return {part: x for name in params for part, x in placed[name].items()}


def read_as(array: LazyArray, index: Index, dtype: np.dtype) -> HostArray:
    """A part of an array as ``dtype``, in memory of its own that devices can take as it is."""
    part = array.read(index)
    if not all_finite(part):
        raise UserError(
            f"{array.where} holds NaN or infinity: the checkpoint is damaged, or its training has "
            "diverged; fetch it again or take an earlier one"
        )
    # Not a view of what was read: that may be a mapped file, which others can change.
    held = np.empty(part.size * dtype.itemsize + _ALIGNMENT, np.uint8)
    start = -held.ctypes.data % _ALIGNMENT
    found = held[start : start + part.size * dtype.itemsize].view(dtype).reshape(part.shape)
    found[...] = part
    return found


def all_finite(array: HostArray) -> bool:
    """Whether a float array holds neither NaN nor infinity; takes about as long as to copy it.

    Their exponents are all ones: the bits are looked at, a cache's worth at a time.
    """
    if array.dtype not in _EXPONENTS:
        return True
    bits, ones = _EXPONENTS[array.dtype]
    # In the order of the memory, so that no copy is made of what lies transposed.
    flat = array.ravel(order="K").view(bits)
    return all(
        bool(np.max(flat[start : start + _LOOKED_AT] & ones) != ones)
        for start in range(0, len(flat), _LOOKED_AT)
    )


def _sharded(
    name: str, array: LazyArray, dtype: np.dtype, sharding: jax.sharding.Sharding, *, report: Report
) -> Array:
    """As ``jax.make_array_from_callback``, with each distinct part read once and then let go."""
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(array.shape).items():
        bounds = zip(index or (), array.shape, strict=True)
        part = tuple(piece.indices(size)[:2] for piece, size in bounds)
        holders.setdefault(part, []).append(device)
    shards: list[Array] = []
    for part, devices in holders.items():
        buffer = read_as(array, tuple(slice(*bounds) for bounds in part), dtype)
        on_devices = [jax.device_put(buffer, device) for device in devices]
        # Transfers run on their own, and each holds its buffer until it is done.
        shards += _finished(on_devices)
        report(name, buffer.size * array.dtype.itemsize)
    return jax.make_array_from_single_device_arrays(array.shape, sharding, shards, dtype=dtype)


def _finished(arrays: Iterable[Array]) -> list[Array]:
    return [array.block_until_ready() for array in arrays]
