"""The output head, and what losses and ranking need of its logits without holding all of them.

A vocabulary of 262,144 words makes the logits of a few hundred targets larger than the weights of
a small model.  ``LazyLogits`` are logits not computed yet.  Their ``statistics`` suffice
for cross entropy, z-loss, accuracy and ranking; where the logits would exceed a bound, they are
computed a part of the vocabulary at a time, in the forward pass and again in the backward pass.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.custom_derivatives import SymbolicZero

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.distributed.sharding import num_shards, with_logical_constraint
from prompt_tuning_jax.models.layers import Embed, Linear, softcap
from prompt_tuning_jax.models.quantization import QuantizedEmbed, QuantizedLinear
from prompt_tuning_jax.typing import Array, HostArray

LOGITS_MB = 64  # default of the largest float32 array of logits, in millions of bytes
_FLOAT32_BYTES = 4


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LogitStatistics:
    """What is known of the logits of each target, float32, all of the targets' shape.

    Attributes:
      log_z: the logarithm of the sum of the exponentials of all logits.
      target: the logit of the target.
      best: int32, the word with the largest logit.
    """

    log_z: Array
    target: Array
    best: Array


def statistics_of(logits: "Array | LazyLogits", targets: Array | HostArray) -> LogitStatistics:
    """Computes the statistics from logits ``[..., V]`` and targets ``[...]``."""
    if isinstance(logits, LazyLogits):
        return logits.statistics(targets)
    logits, targets = logits.astype(jnp.float32), jnp.asarray(targets)
    # logsumexp and a gather, because log_softmax would allocate another [..., V].
    return LogitStatistics(
        log_z=jax.nn.logsumexp(logits, axis=-1),
        target=jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0],
        best=jnp.argmax(logits, axis=-1).astype(jnp.int32),
    )


@dataclass(frozen=True, kw_only=True)
class OutputHead:
    """Maps hidden states to logits: ``softcap(layer(scale * hidden), cap)``.

    ``layer`` is a linear map, an embedding table, or another function from hidden states to logits.
    """

    layer: Linear | QuantizedLinear | Embed | QuantizedEmbed | Callable[[Array], Array]
    vocab_size: int
    scale: float = 1.0
    cap: float = 0.0

    def logits(self, hidden: Array) -> Array:
        """Computes the logits ``[..., V]`` of hidden states ``[..., D]`` in float32."""
        return _logits(self.layer, hidden, scale=self.scale, cap=self.cap)

    @property
    def has_parts(self) -> bool:
        """Whether some words can be computed without the others.

        An adapter may mix the outputs of its linear map.
        """
        if isinstance(self.layer, Linear | QuantizedLinear):
            return self.layer.adapter is None
        return isinstance(self.layer, Embed | QuantizedEmbed)


@dataclass(frozen=True, kw_only=True)
class LazyLogits:
    """The logits of hidden states ``[..., D]``, which are not computed yet.

    Attributes:
      hidden: the head's inputs.
      head: the head, or only its function if the head has no parts.
      max_mb: the largest float32 array of logits that ``statistics`` may hold on a device, in
        millions of bytes.
      copies: how many arrays of logits like this one are computed at the same time, by ``vmap``.
    """

    hidden: Array
    head: OutputHead
    max_mb: float = LOGITS_MB
    copies: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the logits."""
        return (*self.hidden.shape[:-1], self.head.vocab_size)

    def statistics(self, targets: Array | HostArray) -> LogitStatistics:
        """Computes the statistics of targets ``[...]``, and their derivatives, within ``max_mb``.

        The derivatives are those of the hidden states, and of the head if it is trained.
        """
        targets = jnp.asarray(targets)
        rows = math.prod(targets.shape)
        if targets.ndim > 1:
            rows //= num_shards("batch", targets.shape[0])
        shards = num_shards("vocab", self.head.vocab_size)
        words = self.head.vocab_size // shards
        size = self.copies * rows * words * _FLOAT32_BYTES
        number = math.ceil(size / (self.max_mb * 1e6))
        if number <= 1:
            return statistics_of(self.head.logits(self.hidden), targets)
        if not self.head.has_parts:
            return _by_rows(self.head.logits, self.hidden, targets, min(number, rows))
        layer: Any = self.head.layer
        graphdef, params = param_tree.split(layer)
        parts = _Parts(
            graphdef=graphdef,
            words_first=isinstance(layer, Embed | QuantizedEmbed),
            scale=self.head.scale,
            cap=self.head.cap,
            shards=shards,
            words=words,
            size=math.ceil(words / min(number, words)),
        )
        log_z, target, best = _by_parts(parts, params, self.hidden, targets)
        return LogitStatistics(log_z=log_z, target=target, best=best)


def _logits(layer: Any, hidden: Array, *, scale: float, cap: float) -> Array:
    x = hidden if scale == 1.0 else hidden * scale
    logits = layer.attend(x) if isinstance(layer, Embed | QuantizedEmbed) else layer(x)
    return softcap(logits, cap)


def _by_rows(
    logits_of: Callable[[Array], Array], hidden: Array, targets: Array, number: int
) -> LogitStatistics:
    """Computes the statistics of some rows at a time, and their logits again for derivatives."""
    flat_ND, flat_N = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    rows = len(flat_N)
    each = math.ceil(rows / number)
    number = math.ceil(rows / each)

    def dealt(x: Array) -> Array:
        """Splits ``[N, ...]`` into ``[number, each, ...]``; every chunk is on all devices."""
        padded = jnp.pad(x, ((0, number * each - rows), *[(0, 0)] * (x.ndim - 1)))
        return jnp.swapaxes(padded.reshape(each, number, *x.shape[1:]), 0, 1)

    @jax.checkpoint
    def chunk(x_ND: Array, targets_N: Array) -> LogitStatistics:
        return statistics_of(logits_of(x_ND), targets_N)

    chunks = jax.lax.map(lambda args: chunk(*args), (dealt(flat_ND), dealt(flat_N)))
    return jax.tree.map(
        lambda x: jnp.swapaxes(x, 0, 1).reshape(-1)[:rows].reshape(targets.shape), chunks
    )


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """How a head is cut into parts of ``shards * size`` words; static.

    On a mesh, each of ``shards`` devices has ``words`` consecutive words, and a part consists of
    some words of every device, so that no weight moves.  The last part repeats words of the one
    before it if ``size`` does not divide ``words``.  The words are the first axis of every
    parameter of the head, or the last.
    """

    graphdef: nnx.GraphDef[Any]
    words_first: bool
    scale: float
    cap: float
    shards: int
    words: int
    size: int

    @property
    def number(self) -> int:
        return math.ceil(self.words / self.size)

    def logits(self, part: Mapping[str, Array], hidden: Array) -> Array:
        """Computes the logits of the words of a part."""
        layer = param_tree.merge(self.graphdef, part)
        return _logits(layer, hidden, scale=self.scale, cap=self.cap)

    def take(self, params: Mapping[str, Array], i: Array) -> dict[str, Array]:
        """Returns the parameters of part ``i``."""
        return {name: self._take(array, i) for name, array in params.items()}

    def added(self, whole: Array, part: Array, i: Array) -> Array:
        """Adds the numbers of part ``i`` to an array of all words."""
        axis, new = self._axis(whole), self._take(whole, i) + part
        if self.shards == 1:
            return jax.lax.dynamic_update_slice_in_dim(whole, new, self._start(i), axis=axis)
        split, new = self._by_shard(whole, self.words), self._by_shard(new, self.size)
        return jax.lax.dynamic_update_slice_in_dim(
            split, new, self._start(i), axis=axis + 1
        ).reshape(whole.shape)

    def ids(self, i: Array) -> tuple[Array, Array]:
        """Returns the words of part ``i``, and which of them no earlier part has."""
        local = self._start(i) + jnp.arange(self.size)
        ids = jnp.arange(self.shards)[:, None] * self.words + local
        new = jnp.broadcast_to(local >= i * self.size, ids.shape)
        return ids.reshape(-1), new.reshape(-1)

    def places(self, targets: Array, i: Array) -> tuple[Array, Array]:
        """Returns where the targets are in part ``i``, and whether they are among its new words."""
        shard, local = targets // self.words, targets % self.words
        is_here = (local // self.size == i) & (targets >= 0)
        return jnp.where(is_here, shard * self.size + local - self._start(i), 0), is_here

    def _start(self, i: Array) -> Array:
        return jnp.minimum(i * self.size, self.words - self.size)

    def _axis(self, array: Array) -> int:
        return 0 if self.words_first else array.ndim - 1

    def _take(self, array: Array, i: Array) -> Array:
        axis = self._axis(array)
        if self.shards == 1:
            return jax.lax.dynamic_slice_in_dim(array, self._start(i), self.size, axis=axis)
        split = self._by_shard(array, self.words)
        part = jax.lax.dynamic_slice_in_dim(split, self._start(i), self.size, axis=axis + 1)
        shape = (*array.shape[:axis], self.shards * self.size, *array.shape[axis + 1 :])
        axes: list[str | None] = [None] * array.ndim
        axes[axis] = "vocab"
        return with_logical_constraint(part.reshape(shape), axes)

    def _by_shard(self, array: Array, words: int) -> Array:
        axis = self._axis(array)
        return array.reshape(*array.shape[:axis], self.shards, words, *array.shape[axis + 1 :])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_parts(
    parts: _Parts, params: Mapping[str, Array], hidden: Array, targets: Array
) -> tuple[Array, Array, Array]:
    """Returns the fields of ``LogitStatistics``, computed a part of the vocabulary at a time."""

    def accumulate(carry: Any, i: Array) -> tuple[Any, None]:
        largest, total, target, best = carry
        logits = parts.logits(parts.take(params, i), hidden)
        ids, new = parts.ids(i)
        logits = jnp.where(new, logits, -jnp.inf)
        place, is_here = parts.places(targets, i)
        at_target = jnp.take_along_axis(logits, place[..., None], axis=-1)[..., 0]
        top = jnp.max(logits, axis=-1)
        best = jnp.where(top > largest, ids[jnp.argmax(logits, axis=-1)], best)
        larger = jnp.maximum(largest, top)
        added = jnp.sum(jnp.exp(logits - larger[..., None]), axis=-1)
        total = total * jnp.exp(largest - larger) + added
        return (larger, total, jnp.where(is_here, at_target, target), best), None

    zero = jnp.zeros(targets.shape, jnp.float32)
    start = (zero - jnp.inf, zero, zero, zero.astype(jnp.int32))
    (largest, total, target, best), _ = jax.lax.scan(accumulate, start, jnp.arange(parts.number))
    return largest + jnp.log(total), target, best


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class _Saved:
    """What the backward pass needs: the trained parameters of the head, and the frozen ones."""

    trained: Mapping[str, Array]
    frozen: Mapping[str, Array]
    hidden: Array
    targets: Array
    log_z: Array


def _by_parts_forward(
    parts: _Parts, params: Mapping[str, Any], hidden: Any, targets: Any
) -> tuple[tuple[Array, Array, Array], _Saved]:
    trained = {name: p.value for name, p in params.items() if p.perturbed}
    frozen = {name: p.value for name, p in params.items() if not p.perturbed}
    statistics = _by_parts(parts, {**frozen, **trained}, hidden.value, targets.value)
    saved = _Saved(
        trained=trained,
        frozen=frozen,
        hidden=hidden.value,
        targets=targets.value,
        log_z=statistics[0],
    )
    return statistics, saved


def _by_parts_backward(
    parts: _Parts, saved: _Saved, cotangents: tuple[Any, Any, Any]
) -> tuple[dict[str, Array | None], Array, None]:
    dlog_z, dtarget = (
        jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x for x in cotangents[:2]
    )

    def accumulate(carry: Any, i: Array) -> tuple[Any, None]:
        dhidden, dparams = carry
        frozen = parts.take(saved.frozen, i)

        def logits_of(trained: Mapping[str, Array], hidden: Array) -> Array:
            return parts.logits({**frozen, **trained}, hidden)

        logits, derive = jax.vjp(logits_of, parts.take(saved.trained, i), saved.hidden)
        new = parts.ids(i)[1]
        place, is_here = parts.places(saved.targets, i)
        is_target = (jnp.arange(len(new)) == place[..., None]) & is_here[..., None]
        dlogits = dlog_z[..., None] * jnp.exp(logits - saved.log_z[..., None])
        dlogits = jnp.where(is_target, dlogits + dtarget[..., None], dlogits)
        dpart, dhidden_part = derive(jnp.where(new, dlogits, 0.0))
        dparams = {name: parts.added(x, dpart[name], i) for name, x in dparams.items()}
        return (dhidden + dhidden_part.astype(jnp.float32), dparams), None

    start = (
        jnp.zeros(saved.hidden.shape, jnp.float32),
        {name: jnp.zeros_like(x) for name, x in saved.trained.items()},
    )
    (dhidden, dparams), _ = jax.lax.scan(accumulate, start, jnp.arange(parts.number))
    every = {name: dparams.get(name) for name in {**saved.frozen, **saved.trained}}
    return every, dhidden.astype(saved.hidden.dtype), None


_by_parts.defvjp(_by_parts_forward, _by_parts_backward, symbolic_zeros=True)
