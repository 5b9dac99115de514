"""Arrays of a checkpoint that are read part by part, and put on devices as they are needed.

A reader of any format returns ``LazyArray``s under this project's parameter names.
``put_on_devices`` reads, for each device, only the part that the device holds: the host never
holds the whole model, and a process reads nothing that the devices of other processes hold.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import jax
import ml_dtypes
import numpy as np

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.typing import Array, DType, HostArray

Index = tuple[slice, ...]
_COMPARE_BYTES = 1 << 26


@dataclass(frozen=True, kw_only=True)
class LazyArray:
    """An array that has not been read; ``read(index)`` returns a part of it in its stored dtype.

    ``index`` has one slice, of step 1 or None, per dimension.  ``where`` names the file and the
    array in messages.  ``read`` raises UserError if data are missing or damaged.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    where: str
    read: Callable[[Index], HostArray]

    @property
    def nbytes(self) -> int:
        """Bytes in the stored dtype."""
        return prod(self.shape) * self.dtype.itemsize

    def whole(self) -> HostArray:
        """Reads the whole array."""
        return self.read(tuple(slice(None) for _ in self.shape))

    def transposed(self) -> "LazyArray":
        """Returns the array with its axes reversed."""
        return LazyArray(
            shape=self.shape[::-1],
            dtype=self.dtype,
            where=self.where,
            read=lambda index: self.read(index[::-1]).T,
        )

    def layer(self, number: int, *, axis: int) -> "LazyArray":
        """Returns entry ``number`` along ``axis``, without that axis: a layer of a stack."""

        def read(index: Index) -> HostArray:
            whole = (*index[:axis], slice(number, number + 1), *index[axis:])
            return np.squeeze(self.read(whole), axis)

        return LazyArray(
            shape=(*self.shape[:axis], *self.shape[axis + 1 :]),
            dtype=self.dtype,
            where=self.where,
            read=read,
        )

    def taken(self, order: HostArray, *, axis: int) -> "LazyArray":
        """Returns the entries ``order``, distinct numbers, along ``axis``: a part of a fused array.

        Consecutive entries are read together, and no entry that is not asked for.
        """

        def read(index: Index) -> HostArray:
            wanted = order[index[axis]]
            if not len(wanted):
                return self.read((*index[:axis], slice(0, 0), *index[axis + 1 :]))
            ascending = np.sort(wanted)
            gaps = np.flatnonzero(np.diff(ascending) > 1) + 1
            runs = [slice(int(run[0]), int(run[-1]) + 1) for run in np.split(ascending, gaps)]
            parts = [self.read((*index[:axis], run, *index[axis + 1 :])) for run in runs]
            together = parts[0] if len(parts) == 1 else np.concatenate(parts, axis)
            if np.array_equal(wanted, ascending):
                return together
            return np.take(together, np.searchsorted(ascending, wanted), axis)

        shape = (*self.shape[:axis], len(order), *self.shape[axis + 1 :])
        return LazyArray(shape=shape, dtype=self.dtype, where=self.where, read=read)


def in_memory(array: HostArray, *, where: str) -> LazyArray:
    """Returns a ``LazyArray`` of an array in memory."""
    array = np.asarray(array)
    return LazyArray(
        shape=array.shape, dtype=array.dtype, where=where, read=lambda index: array[index]
    )


def concatenated(arrays: Sequence[LazyArray], *, axis: int) -> LazyArray:
    """Returns the arrays one after the other along ``axis``.

    They have one dtype, and shapes that are otherwise equal.
    """
    sizes = [array.shape[axis] for array in arrays]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    total = sum(sizes)

    def read(index: Index) -> HostArray:
        start, stop, _ = index[axis].indices(total)
        parts: list[HostArray] = []
        for array, first, size in zip(arrays, starts, sizes, strict=True):
            inside = slice(min(max(start - first, 0), size), min(max(stop - first, 0), size))
            if inside.start < inside.stop or (array is arrays[-1] and not parts):
                parts.append(array.read((*index[:axis], inside, *index[axis + 1 :])))
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis)

    return LazyArray(
        shape=(*arrays[0].shape[:axis], total, *arrays[0].shape[axis + 1 :]),
        dtype=arrays[0].dtype,
        where=arrays[0].where,
        read=read,
    )


def equal_bits(left: LazyArray, right: LazyArray) -> bool:
    """Returns whether two arrays are equal bit for bit, comparing some rows at a time."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    row_bytes = max(1, left.dtype.itemsize * prod(left.shape[1:]))
    rows = max(1, _COMPARE_BYTES // row_bytes)
    rest = (slice(None),) * (len(left.shape) - 1)
    return all(
        left.read((slice(start, start + rows), *rest)).tobytes()
        == right.read((slice(start, start + rows), *rest)).tobytes()
        for start in range(0, left.shape[0] if left.shape else 0, rows)
    )


# Called with an array's name and the number of bytes that were read.
Report: TypeAlias = Callable[[str, int], None]


@contextmanager
def progress(title: str, *, total: int | None = None) -> Iterator[Report]:
    """Shows a progress bar of names and bytes on a terminal, and removes it at the end.

    ``total`` is in bytes; None if it is not known.  Without a terminal nothing is shown, and of
    several processes only the first shows the bar.
    """
    import jax

    if not sys.stderr.isatty() or jax.process_index() != 0:
        yield lambda name, size: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
    from rich.table import Column

    bar = Progress(
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("{task.fields[name]}", markup=False, table_column=Column(no_wrap=True)),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task(title, total=total, name="")
        yield lambda name, size: bar.update(task, advance=size, name=name)


# Bytes; XLA uses aligned host memory on CPU without a copy.
_ALIGNMENT = 64
# dtype -> the unsigned integer type of its width, and the bits of its exponent.
_EXPONENTS: dict[np.dtype, tuple[np.dtype, np.unsignedinteger]] = {
    np.dtype(np.float32): (np.dtype(np.uint32), np.uint32(0x7F800000)),
    np.dtype(np.float16): (np.dtype(np.uint16), np.uint16(0x7C00)),
    np.dtype(ml_dtypes.bfloat16): (np.dtype(np.uint16), np.uint16(0x7F80)),
}
_FINITE_CHECK_SIZE = 2**16


def put_on_devices(
    params: Mapping[str, LazyArray],
    *,
    dtype: DType,
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
    title: str = "reading",
    finish: Callable[[str, Array], Mapping[str, Array]] | None = None,
    as_stored: Callable[[str], bool] = lambda name: False,
) -> dict[str, Array]:
    """Puts every array on devices as ``dtype``, sharded by ``shardings``; returns them by name.

    Without ``shardings`` each array is whole on the default device.  A part that several devices
    hold is read once.  ``finish(name, array)`` replaces an array on devices by one or several, by
    name, before the next array is read; arrays for which ``as_stored`` is true keep their stored
    dtype until then.  Raises UserError for arrays that cannot be read.
    """
    placed = {}
    with progress(title, total=sum(array.nbytes for array in params.values())) as report:
        # In the order of storage, layers of one stack follow each other, and reuse a cached chunk.
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
    """Reads a part of an array as ``dtype``, in new aligned memory that devices use directly."""
    part = array.read(index)
    if not all_finite(part):
        raise UserError(
            f"{array.where} holds NaN or infinity: the checkpoint is damaged, or its training "
            "diverged; fetch it again or use an earlier one"
        )
    # A copy, because what was read may be a mapped file that other processes can change.
    buffer = np.empty(part.size * dtype.itemsize + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    copy = buffer[start : start + part.size * dtype.itemsize].view(dtype).reshape(part.shape)
    copy[...] = part
    return copy


def all_finite(array: HostArray) -> bool:
    """Returns whether a float array holds neither NaN nor infinity; about as fast as a copy.

    Their exponents are all ones: the bits are checked, one cache-sized block at a time.
    """
    if array.dtype not in _EXPONENTS:
        return True
    bits, ones = _EXPONENTS[array.dtype]
    # In memory order, so that a transposed array is not copied.
    flat = array.ravel(order="K").view(bits)
    return all(
        bool(np.max(flat[start : start + _FINITE_CHECK_SIZE] & ones) != ones)
        for start in range(0, len(flat), _FINITE_CHECK_SIZE)
    )


def _sharded(
    name: str, array: LazyArray, dtype: np.dtype, sharding: jax.sharding.Sharding, *, report: Report
) -> Array:
    """Like ``jax.make_array_from_callback``, but each distinct part is read once and then freed."""
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(array.shape).items():
        bounds = zip(index or (), array.shape, strict=True)
        part = tuple(piece.indices(size)[:2] for piece, size in bounds)
        holders.setdefault(part, []).append(device)
    shards: list[Array] = []
    for part, devices in holders.items():
        buffer = read_as(array, tuple(slice(*bounds) for bounds in part), dtype)
        on_devices = [jax.device_put(buffer, device) for device in devices]
        # Transfers are asynchronous, and each holds its buffer until it is done.
        shards += _finished(on_devices)
        report(name, buffer.size * array.dtype.itemsize)
    return jax.make_array_from_single_device_arrays(array.shape, sharding, shards, dtype=dtype)


def _finished(arrays: Iterable[Array]) -> list[Array]:
    return [array.block_until_ready() for array in arrays]
