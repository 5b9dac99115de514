"""What the device holds of the prompts and methods that are served.

There may be many more than fit on the device; the least recently used make room.  Programs take
one large array of N rows (of prompts, or of the trained arrays of all methods with one
``AdapterSpec``), and for each row of a batch the index of its own.  Arrays that are too large to be
gathered by row, such as all weights of a model, are kept one method at a time instead.  All caches
are used by one thread.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax.distributed.sharding import Partitioner, activation_sharding, spans_devices
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.serving.shapes import HoldProgram, Shapes
from prompt_tuning_jax.serving.tasks import AdapterSpec, Served, ServedMethod, ServedPrompt
from prompt_tuning_jax.typing import Array, DType, FlatParams, HostArray

MAX_GATHERED_BYTES = 2**27  # of the arrays that the rows of one batch gather
_MAX_PROMPT_BYTES = 2**30  # of all prompts on the device
_MAX_SPEC_BYTES = 2**31  # of all arrays of one spec on the device


class Cache(Protocol):
    """What the engine asks of each of the three caches below."""

    capacity: int  # how many prompts or methods are on the device at once
    gathered: bool  # whether each row of a batch may have another one

    def take(self, members: Sequence[Served | None]) -> tuple[Any, HostArray]:
        """Arrays with all these members on the device, and the index ``[B]`` of each in them."""
        ...

    def abstract(self) -> Any:
        """Returns shapes, dtypes and shardings of the arrays."""
        ...

    def clear(self) -> None:
        """Forgets everything: after a failure the arrays may be gone."""
        ...


class LruRows:
    """Assigns N rows to more keys than N; the least recently used keys make room."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._row_of: OrderedDict[int, int] = OrderedDict()

    def __getitem__(self, key: int) -> int:
        return self._row_of[key]

    def clear(self) -> None:
        self._row_of.clear()

    def take(self, wanted: Iterable[int]) -> list[int]:
        """Gives each of at most N keys a row; returns the keys whose row is new."""
        missing = []
        for key in wanted:
            if key in self._row_of:
                self._row_of.move_to_end(key)
            else:
                missing.append(key)
        for key in missing:
            # The key that makes room is never a wanted one: those have been moved to the end.
            full = len(self._row_of) == self._rows
            row = self._row_of.popitem(last=False)[1] if full else len(self._row_of)
            self._row_of[key] = row
        return missing


class PromptCache:
    """The prompts of N rows on the device, as the programs take them.

    ``hold`` computes, from K prompts ``[K, P, D]``, the arrays ``[K, ...]`` that are held: for an
    encoder-decoder the prompts themselves, each at the end of its row, after zeros; for a
    decoder-only model (``at_end=False``) their keys and values, so that no request computes them.
    Missing prompts of a batch are copied in few calls of the programs that are ``compiled``, which
    returns None for one that is not compiled yet; that of the first of ``copy_sizes`` always is.
    """

    gathered = True

    def __init__(
        self,
        *,
        rows: int,
        length: int,
        width: int,
        dtype: DType,
        copy_sizes: Sequence[int],
        hold: Callable[[FlatParams, Array], Any],
        params: FlatParams,
        compiled: Callable[[HoldProgram], Any],
        at_end: bool = True,
        partitioner: Partitioner | None = None,
    ) -> None:
        if rows < max(copy_sizes):
            raise UserError(
                f"cache_rows is {rows}; it must be at least {max(copy_sizes)}, the largest batch"
            )
        self.hits = self.misses = 0
        self._copy_sizes = tuple(copy_sizes)
        self._length, self._width = length, width
        self._dtype, self._partitioner = jnp.dtype(dtype), partitioner
        self._params, self._at_end, self._compiled = params, at_end, compiled
        one = jax.eval_shape(hold, params, jax.ShapeDtypeStruct((1, length, width), self._dtype))
        self._held_of_one = one
        row_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(one))
        fitting = max(max(copy_sizes), _MAX_PROMPT_BYTES // row_bytes)
        self.capacity = min(rows, fitting)
        self._lru = LruRows(self.capacity)

        def copy(whole: Any, params: FlatParams, row_K: Array, new_KPD: Array) -> Any:
            with activation_sharding(partitioner):
                new = hold(params, new_KPD)
                return jax.tree.map(
                    lambda x, part: x.at[row_K].set(part.astype(x.dtype), mode="drop"), whole, new
                )

        out: dict[str, Any] = {}
        if spans_devices(partitioner):
            out["out_shardings"] = partitioner.replicated
        self._copy = jax.jit(copy, donate_argnums=0, **out)
        self.clear()

    def clear(self) -> None:
        self._lru.clear()

        def empty(one: jax.ShapeDtypeStruct) -> Array:
            zeros = np.zeros((self.capacity, *one.shape[1:]), one.dtype)
            return _replicated(zeros, self._partitioner)

        self._held: Any = jax.tree.map(empty, self._held_of_one)

    def compile(self, program: HoldProgram) -> Any:
        """Compiles the copying of at most so many prompts."""
        new = self._on_device([], program.prompts)
        return self._copy.lower(self.abstract(), self._params, *new).compile()

    def take(self, members: Sequence[Served | None]) -> tuple[Any, HostArray]:
        """Returns the arrays that are held, and the row of each prompt.

        The row of None, the bare model, is 0.
        """
        wanted = {one.number: one for one in members if isinstance(one, ServedPrompt)}
        missing = [wanted[number] for number in self._lru.take(wanted)]
        self.hits += len(wanted) - len(missing)
        self.misses += len(missing)
        while missing:
            known = {size: self._compiled(HoldProgram(prompts=size)) for size in self._copy_sizes}
            sizes = [size for size in self._copy_sizes if known[size] is not None]
            size = next((size for size in sizes if size >= len(missing)), sizes[-1])
            now, missing = missing[:size], missing[size:]
            self._held = known[size](self._held, self._params, *self._on_device(now, size))
        rows = [0 if one is None else self._lru[one.number] for one in members]
        return self._held, np.array(rows, np.int32)

    def abstract(self) -> Any:
        return abstract(self._held, self._partitioner)

    def _on_device(self, prompts: Sequence[ServedPrompt], size: int) -> tuple[Array, Array]:
        """Returns the rows ``[K]`` of at most K prompts, and the prompts ``[K, P, D]``."""
        row_K = np.full(size, self.capacity, np.int32)  # nowhere
        row_K[: len(prompts)] = [self._lru[prompt.number] for prompt in prompts]
        new_KPD = np.zeros((size, self._length, self._width), self._dtype)
        for new_PD, prompt in zip(new_KPD, prompts, strict=False):
            start = self._length - len(prompt.prompt_PD) if self._at_end else 0
            new_PD[start : start + len(prompt.prompt_PD)] = prompt.prompt_PD
        return _replicated(row_K, self._partitioner), _replicated(new_KPD, self._partitioner)


class AdapterStack:
    """The trained arrays ``[N, ...]``, by path, of N methods with one spec."""

    gathered = True

    def __init__(
        self, adapter_spec: AdapterSpec, capacity: int, partitioner: Partitioner | None
    ) -> None:
        self.capacity = capacity
        self._spec, self._partitioner = adapter_spec, partitioner
        self._lru = LruRows(capacity)
        self._put = jax.jit(_put_row, donate_argnums=0)
        self.clear()

    def clear(self) -> None:
        self._lru.clear()
        self._arrays: FlatParams = {
            name: _replicated(np.zeros((self.capacity, *one.shape), one.dtype), self._partitioner)
            for name, one in self._spec.shapes.items()
        }

    def take(self, members: Sequence[Served | None]) -> tuple[FlatParams, HostArray]:
        wanted = {one.number: one for one in members if isinstance(one, ServedMethod)}
        for number in self._lru.take(wanted):
            self._copy(wanted[number], self._lru[number])
        return self._arrays, np.array([self._lru[number] for number in _numbers(members)], np.int32)

    def abstract(self) -> Any:
        return abstract(self._arrays, self._partitioner)

    def _copy(self, method: ServedMethod, row: int) -> None:
        try:
            new = {name: _replicated(a, self._partitioner) for name, a in method.trainable.items()}
            self._arrays = self._put(self._arrays, jnp.int32(row), new)
        except Exception:
            self.clear()
            raise


class SingleAdapters:
    """The trained arrays of a few methods, each by itself; a batch is of one method."""

    gathered = False

    def __init__(
        self, adapter_spec: AdapterSpec, capacity: int, partitioner: Partitioner | None
    ) -> None:
        self.capacity = capacity
        self._spec, self._partitioner = adapter_spec, partitioner
        self._arrays: OrderedDict[int, FlatParams] = OrderedDict()

    def clear(self) -> None:
        self._arrays.clear()

    def take(self, members: Sequence[Served | None]) -> tuple[FlatParams, HostArray]:
        (method,) = {m.number: m for m in members if isinstance(m, ServedMethod)}.values()
        if method.number not in self._arrays:
            while len(self._arrays) >= self.capacity:
                self._arrays.popitem(last=False)
            self._arrays[method.number] = {
                name: device_put(array, self._spec.axes[name], self._partitioner)
                for name, array in method.trainable.items()
            }
        self._arrays.move_to_end(method.number)
        return self._arrays[method.number], np.zeros(len(members), np.int32)

    def abstract(self) -> Any:
        partitioner = self._partitioner
        if not spans_devices(partitioner):
            return dict(self._spec.shapes)
        return {
            name: jax.ShapeDtypeStruct(
                one.shape,
                one.dtype,
                sharding=partitioner.sharding(self._spec.axes[name], one.shape),
            )
            for name, one in self._spec.shapes.items()
        }


def adapter_caches(
    methods: Sequence[ServedMethod],
    *,
    shapes: Shapes,
    max_methods: int,
    partitioner: Partitioner | None = None,
) -> Mapping[AdapterSpec, AdapterStack | SingleAdapters]:
    """Returns a cache for each spec: of ``max_methods``, or fewer where they are large."""
    rows = max(shapes.batch_sizes[-1], shapes.pools[-1].slots.stop)
    caches: dict[AdapterSpec, AdapterStack | SingleAdapters] = {}
    for spec in dict.fromkeys(method.adapter_spec for method in methods):
        number = sum(method.adapter_spec is spec for method in methods)
        fitting = min(max_methods, _MAX_SPEC_BYTES // max(1, spec.bytes))
        if spec.bytes * rows <= MAX_GATHERED_BYTES:
            caches[spec] = AdapterStack(spec, min(number, max(fitting, rows)), partitioner)
        else:
            caches[spec] = SingleAdapters(spec, max(1, fitting), partitioner)
    return caches


def device_put(
    array: HostArray, axes: tuple[str | None, ...], partitioner: Partitioner | None
) -> Array:
    """Returns the array on the device; on a mesh, sharded by its logical axes."""
    if not spans_devices(partitioner):
        return jnp.asarray(array)
    return jax.device_put(array, partitioner.sharding(axes, array.shape))


def abstract(arrays: Any, partitioner: Partitioner | None) -> Any:
    """Returns shapes, dtypes and, on a mesh, shardings, to compile for."""
    on_mesh = spans_devices(partitioner)

    def one(array: Any) -> Any:
        sharding = array.sharding if on_mesh else None
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    return jax.tree.map(one, arrays)


def _replicated(array: HostArray, partitioner: Partitioner | None) -> Array:
    return device_put(array, (None,) * np.ndim(array), partitioner)


def _put_row(stack: FlatParams, row: Array, new: FlatParams) -> FlatParams:
    return {name: array.at[row].set(new[name]) for name, array in stack.items()}


def _numbers(members: Sequence[Served | None]) -> list[int]:
    return [one.number for one in members if one is not None]
