"""The compiled functions of methods that are no plain prompts, and what the device holds of them.

They are made for a structure.  The frozen arrays are the engine's own, and tuned arrays are
arguments, so that any number of LoRAs of one shape share their programs, and their batches too:
each row computes with its own arrays, gathered on the device.  Large arrays (all weights of a
model) are not gathered, and arrays on a mesh neither: there a batch is of one method.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.distributed.sharding import Partitioner, activation_sharding, replicate
from prompt_tuning_jax.inference.decoding.greedy import Decoded, greedy
from prompt_tuning_jax.methods.base import UNKNOWN_LABEL_LOG_PROB, TunedModel, same_tokens
from prompt_tuning_jax.serving.adapter_spec import AdapterSpec, ServedMethod
from prompt_tuning_jax.serving.lru_cache import Places
from prompt_tuning_jax.serving.prompt_position import device_put, scored
from prompt_tuning_jax.serving.rows import Row, WriteOptions
from prompt_tuning_jax.serving.shapes import Program, Shapes
from prompt_tuning_jax.typing import Array, FlatParams

_MOST_BYTES = 2**27  # of the arrays that the rows of a batch have of their own
_HELD_BYTES = 2**31  # of the arrays of one structure that stay on the device

# The tuned arrays of the one method of all rows, or those of several and which is each row's.
Tuned: TypeAlias = FlatParams | tuple[FlatParams, Array]


@dataclass(frozen=True)
class MethodPrograms:
    """The functions for one structure; each is pure, and compiled by the engine."""

    adapter_spec: AdapterSpec
    partitioner: Partitioner | None = None

    def score(
        self, params: FlatParams, trainable: Tuned, tokens_BT: Array, targets_BCS: Array
    ) -> Array:
        """``[B, C]``: log-probabilities of each row's own targets, as when they are ranked.

        Of a method that scores labels itself, those of its labels; other targets are never.
        """
        with activation_sharding(self.partitioner):
            if not isinstance(trainable, tuple):
                return replicate(self._score(params, trainable, tokens_BT, targets_BCS))

            def of_one(own: FlatParams, tokens_T: Array, targets_CS: Array) -> Array:
                return self._score(params, own, tokens_T[None], targets_CS[None])[0]

            return jax.vmap(of_one)(_of_rows(trainable), tokens_BT, targets_BCS)

    def write(
        self,
        params: FlatParams,
        trainable: Tuned,
        tokens_BT: Array,
        options: WriteOptions,
        *,
        max_length: int,
    ) -> Decoded:
        """The most probable tokens, within each row's ``options``; the whole batch to its end."""
        write = partial(
            greedy,
            num_rows=len(tokens_BT),
            max_length=max_length,
            limit_N=options.limit_B,
            processors=options.processors,
            token_ids=self.adapter_spec.token_ids,
        )
        with activation_sharding(self.partitioner):
            if not isinstance(trainable, tuple):
                caches, constant = self._start(params, trainable, tokens_BT, max_length)

                def step(tokens_B: Array, position: Array, caches: Any) -> tuple[Array, Any]:
                    return self._step(params, trainable, tokens_B, position, caches, constant)

                return replicate(write(step, caches))
            own_B = _of_rows(trainable)

            def start_one(own: FlatParams, tokens_T: Array) -> tuple[Any, Any]:
                return self._start(params, own, tokens_T[None], max_length)

            caches, constant = jax.vmap(start_one)(own_B, tokens_BT)

            def step_each(tokens_B: Array, position: Array, caches: Any) -> tuple[Array, Any]:
                def step_one(own: Any, token: Any, cache: Any, constant: Any) -> tuple[Array, Any]:
                    made = self._step(params, own, token[None], position, cache, constant)
                    return made[0][0], made[1]

                return jax.vmap(step_one)(own_B, tokens_B, caches, constant)

            return write(step_each, caches)

    def _score(
        self, params: FlatParams, trainable: FlatParams, tokens_BT: Array, targets_BCS: Array
    ) -> Array:
        attached = self._attached(params, trainable)
        if self.adapter_spec.label_tokens:
            return self._own_scores(attached, tokens_BT, targets_BCS)
        encoded, slots = attached.encode(tokens_BT)
        rest = slots.of_decoder()

        def logits_of(shifted_BS: Array) -> Array:
            return attached.model.decode(shifted_BS, encoded, injections=rest)

        vocabulary = attached.model.config.vocab_size
        ids = attached.model.token_ids
        return scored(logits_of, targets_BCS, vocab_size=vocabulary, token_ids=ids)

    def _start(
        self, params: FlatParams, trainable: FlatParams, tokens_BT: Array, max_length: int
    ) -> tuple[Any, Any]:
        """The decoder's caches, and what it looks at in every step."""
        attached = self._attached(params, trainable)
        encoded, slots = attached.encode(tokens_BT)
        cross, caches = attached.model.start_decoding(encoded, max_length)
        return caches, (cross, encoded.mask_BU, slots.of_decoder())

    def _step(
        self,
        params: FlatParams,
        trainable: FlatParams,
        tokens_B: Array,
        position: Array,
        caches: Any,
        constant: Any,
    ) -> tuple[Array, Any]:
        attached = self._attached(params, trainable)
        cross, mask_BU, rest = constant
        return attached.model.decode_step(
            tokens_B, position, caches, cross, mask_BU, injections=rest
        )

    def _attached(self, params: FlatParams, trainable: FlatParams) -> TunedModel:
        frozen = {f"model/{name}": array for name, array in params.items()}
        return param_tree.merge(self.adapter_spec.graphdef, {**frozen, **trainable})

    def _own_scores(self, attached: TunedModel, tokens_BT: Array, targets_BCS: Array) -> Array:
        own = self.adapter_spec.label_tokens
        fill = attached.model.token_ids.fill
        labels_LS = np.full((len(own), max(map(len, own))), fill, np.int32)
        for label_S, ids in zip(labels_LS, own, strict=True):
            label_S[: len(ids)] = ids
        scores_BL = attached.label_scores(tokens_BT, jnp.asarray(labels_LS))
        batch, number, length = targets_BCS.shape
        same = same_tokens(targets_BCS.reshape(-1, length), own, padding=fill)
        same_BCL = same.reshape(batch, number, len(own))
        chosen_BC = jnp.take_along_axis(scores_BL, jnp.argmax(same_BCL, axis=-1), axis=1)
        return jnp.where(same_BCL.any(axis=-1), chosen_BC, UNKNOWN_LABEL_LOG_PROB)


class Methods:
    """The structures, and the tuned arrays that the device holds of ``most`` methods of each.

    Fewer where they are large.  Used by one thread.
    """

    def __init__(
        self,
        methods: Sequence[ServedMethod],
        *,
        shapes: Shapes,
        most: int,
        partitioner: Partitioner | None = None,
    ) -> None:
        # One of each structure, to be timed with.
        self._one_of = {method.adapter_spec: method for method in methods}
        self._shapes, self._layout = shapes, partitioner
        self._held: dict[AdapterSpec, Stack | Singles] = {}
        for adapter_spec in self._one_of:
            number = sum(method.adapter_spec is adapter_spec for method in methods)
            room = min(most, _HELD_BYTES // max(1, adapter_spec.bytes))
            if self._together(adapter_spec):
                rows = max(room, shapes.batch_sizes[-1])
                self._held[adapter_spec] = Stack(adapter_spec, min(number, rows))
            else:
                self._held[adapter_spec] = Singles(max(1, room), partitioner)

    def programs(self) -> Iterator[Program]:
        """All that there are."""
        return chain.from_iterable(map(self._shapes.programs_of, self._one_of))

    def one_of(self, adapter_spec: AdapterSpec | None) -> ServedMethod | None:
        """Any with this structure; None for plain prompts."""
        return None if adapter_spec is None else self._one_of[adapter_spec]

    def shared_by(self, method: ServedMethod) -> Hashable:
        """Equal for methods whose rows can be in one batch."""
        together = isinstance(self._held[method.adapter_spec], Stack)
        return method.adapter_spec if together else method.number

    def name_of(self, program: Program) -> str:
        """What is said while it is compiled."""
        assert program.adapter_spec is not None
        method = self._one_of[program.adapter_spec].method
        return f"{program.kind} {program.rows} x {program.length} tokens of {method}"

    def function(self, program: Program) -> Any:
        """What is to be compiled."""
        assert program.adapter_spec is not None
        functions = MethodPrograms(program.adapter_spec, self._layout)
        if program.targets is not None:
            return jax.jit(functions.score)
        return jax.jit(partial(functions.write, max_length=self._shapes.max_new_tokens))

    def tuned_of(self, rows: Sequence[Row], program: Program) -> Tuned:
        """What a program of these rows computes with; the least recently used make room for it."""
        methods = [row.method for row in rows if row.method is not None]
        assert program.adapter_spec is not None and len(methods) == len(rows)
        return self._held[program.adapter_spec].of(methods, rows=program.rows)

    def like(self, program: Program) -> Any:
        """The tuned arrays to compile for."""
        adapter_spec = program.adapter_spec
        assert adapter_spec is not None
        held = self._held[adapter_spec]
        if isinstance(held, Stack):
            arrays = {
                name: jax.ShapeDtypeStruct(one.shape, one.dtype)
                for name, one in held.arrays.items()
            }
            return arrays, jax.ShapeDtypeStruct((program.rows,), jnp.int32)
        partitioner = self._layout
        if partitioner is None or partitioner.is_single_device:
            return dict(adapter_spec.shapes)
        return {
            name: jax.ShapeDtypeStruct(
                one.shape,
                one.dtype,
                sharding=partitioner.sharding(adapter_spec.axes[name], one.shape),
            )
            for name, one in adapter_spec.shapes.items()
        }

    def _together(self, adapter_spec: AdapterSpec) -> bool:
        one_device = self._layout is None or self._layout.is_single_device
        return one_device and adapter_spec.bytes * self._shapes.batch_sizes[-1] <= _MOST_BYTES


class Singles:
    """The tuned arrays of at most so many methods, each by itself."""

    def __init__(self, most: int, partitioner: Partitioner | None) -> None:
        self._most, self._layout = most, partitioner
        self._held: OrderedDict[int, dict[str, Array]] = OrderedDict()

    def of(self, methods: Sequence[ServedMethod], *, rows: int) -> Tuned:
        """By path, of the one method of all rows."""
        (method,) = set(methods)
        if method.number not in self._held:
            while len(self._held) >= self._most:
                self._held.popitem(last=False)
            axes = method.adapter_spec.axes
            self._held[method.number] = {
                name: device_put(array, axes[name], self._layout)
                for name, array in method.trainable.items()
            }
        self._held.move_to_end(method.number)
        return self._held[method.number]


class Stack:
    """The tuned arrays ``[N, ...]``, by path, of N methods of one structure."""

    def __init__(self, adapter_spec: AdapterSpec, number: int) -> None:
        self._structure, self._number = adapter_spec, number
        self._places = Places(number)
        self._put = jax.jit(_put, donate_argnums=0)
        self.clear()

    def clear(self) -> None:
        """Forgets everything, the arrays too: after a failure they may be gone."""
        self._places.clear()
        self.arrays: FlatParams = {
            name: jnp.zeros((self._number, *one.shape), one.dtype)
            for name, one in self._structure.shapes.items()
        }

    def of(self, methods: Sequence[ServedMethod], *, rows: int) -> Tuned:
        """The arrays, and the number ``[B]`` among them of each row's method; all are there."""
        wanted = {method.number: method for method in methods}
        for number in self._places.take(wanted):
            self._copy(wanted[number], self._places[number])
        row_B = np.zeros(rows, np.int32)
        row_B[: len(methods)] = [self._places[method.number] for method in methods]
        return self.arrays, jnp.asarray(row_B)

    def _copy(self, method: ServedMethod, row: int) -> None:
        try:
            self.arrays = self._put(self.arrays, jnp.int32(row), dict(method.trainable))
        except Exception:
            self.clear()
            raise


def _put(stack: FlatParams, row: Array, trainable: FlatParams) -> FlatParams:
    return {name: array.at[row].set(trainable[name]) for name, array in stack.items()}


def _of_rows(trainable: tuple[FlatParams, Array]) -> FlatParams:
    """By path, each row's own ``[B, ...]``."""
    arrays, row_B = trainable
    return {name: array[row_B] for name, array in arrays.items()}
