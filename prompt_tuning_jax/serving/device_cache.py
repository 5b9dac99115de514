"""The prompts that the device holds: N rows of many more, the least recently used go first."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax.distributed.sharding import Partitioner
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.serving.lru_cache import Places
from prompt_tuning_jax.serving.tasks import ServedPrompt
from prompt_tuning_jax.typing import Array, DType, HostArray


class DeviceCache:
    """``prompts_NPD`` on the device; prompts stand at the end of their row, zeros in front.

    Used by one thread.  What is not there is copied in one call for a whole batch, whose sizes are
    those of ``copy_sizes``, so that it is compiled beforehand.
    """

    def __init__(
        self,
        *,
        rows: int,
        length: int,
        width: int,
        dtype: DType,
        copy_sizes: Sequence[int],
        partitioner: Partitioner | None = None,
    ) -> None:
        if rows < max(copy_sizes):
            raise UserError(
                f"cache_rows is {rows}; a batch of {max(copy_sizes)} rows needs as many at least"
            )
        self.hits = self.misses = 0
        self._copy_sizes = tuple(copy_sizes)
        self._places = Places(rows)
        self._rows, self._length, self._width = rows, length, width
        self._dtype, self._layout = jnp.dtype(dtype), partitioner
        self._copy = jax.jit(_copy, donate_argnums=0)
        self.clear()

    def clear(self) -> None:
        """Forgets everything, the array too: after a failure it may be gone."""
        shape = (self._rows, self._length, self._width)
        self._places.clear()
        self.prompts_NPD: Array = self._placed(np.zeros(shape, self._dtype))
        for size in self._copy_sizes:  # compiles
            nowhere = np.full(size, self._rows, np.int32)
            self._put(nowhere, np.zeros((size, *shape[1:]), self._dtype))

    def rows_of(self, prompts: Sequence[ServedPrompt | None]) -> HostArray:
        """The row ``[B]`` of each prompt, all there at once; 0 for None, the bare model."""
        wanted = {prompt.number: prompt for prompt in prompts if prompt is not None}
        missing = [wanted[number] for number in self._places.take(wanted)]
        self.hits += len(wanted) - len(missing)
        self.misses += len(missing)
        rows = [self._places[prompt.number] for prompt in missing]
        while missing:
            number = next((s for s in self._copy_sizes if s >= len(missing)), self._copy_sizes[-1])
            now, missing = missing[:number], missing[number:]
            row_K = np.full(number, self._rows, np.int32)  # nowhere
            row_K[: len(now)], rows = rows[: len(now)], rows[len(now) :]
            new_KPD = np.zeros((number, self._length, self._width), self._dtype)
            for new_PD, prompt in zip(new_KPD, now, strict=False):
                new_PD[self._length - len(prompt.prompt_PD) :] = prompt.prompt_PD
            self._put(row_K, new_KPD)
        return np.array([0 if p is None else self._places[p.number] for p in prompts], np.int32)

    def _put(self, row_K: HostArray, new_KPD: HostArray) -> None:
        device_put = self._placed(row_K), self._placed(new_KPD)
        self.prompts_NPD = self._copy(self.prompts_NPD, *device_put)

    def _placed(self, array: HostArray) -> Array:
        if self._layout is None or self._layout.is_single_device:
            return jnp.asarray(array)
        return jax.device_put(array, self._layout.replicated)


def _copy(prompts_NPD: Array, row_K: Array, new_KPD: Array) -> Array:
    return prompts_NPD.at[row_K].set(new_KPD, mode="drop")
