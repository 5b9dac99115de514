"""The compiled functions of methods that are no plain prompts: a batch with one method for all.

They are made for a structure.  The frozen arrays are the engine's own, and tuned arrays are
arguments, so that any number of LoRAs of one shape share their programs.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax import tree
from prompt_tuning_jax.decoding.greedy import Decoded, greedy
from prompt_tuning_jax.layout import Layout, laying_out, replicate
from prompt_tuning_jax.methods.method import NEVER, Attached, same_tokens
from prompt_tuning_jax.serving.placing import placed, scored
from prompt_tuning_jax.serving.rows import Row
from prompt_tuning_jax.serving.shapes import Program, Shapes
from prompt_tuning_jax.serving.structures import ServedMethod, Structure
from prompt_tuning_jax.typing import Array, FlatParams


@dataclass(frozen=True)
class MethodPrograms:
    """The functions for one structure; each is pure, and compiled by the engine."""

    structure: Structure
    layout: Layout | None = None

    def score(
        self, params: FlatParams, tuned: FlatParams, tokens_BT: Array, targets_BCS: Array
    ) -> Array:
        """``[B, C]``: log-probabilities of each row's own targets, as when they are ranked.

        Of a method that scores labels itself, those of its labels; other targets are never.
        """
        with laying_out(self.layout):
            attached = self._attached(params, tuned)
            if self.structure.own_labels:
                return replicate(self._own_scores(attached, tokens_BT, targets_BCS))
            encoded, slots = attached.encode(tokens_BT)
            rest = slots.of_decoder()

            def logits_of(shifted_BS: Array) -> Array:
                return attached.model.decode(shifted_BS, encoded, slots=rest)

            vocabulary = attached.model.config.vocab_size
            return replicate(scored(logits_of, targets_BCS, vocab_size=vocabulary))

    def write(
        self,
        params: FlatParams,
        tuned: FlatParams,
        tokens_BT: Array,
        limit_B: Array,
        *,
        max_length: int,
    ) -> Decoded:
        """The most probable tokens, at most ``limit_B`` of them; the whole batch to its end."""
        with laying_out(self.layout):
            attached = self._attached(params, tuned)
            encoded, slots = attached.encode(tokens_BT)
            cross, caches = attached.model.start_decoding(encoded, max_length)
            rest = slots.of_decoder()

            def step(tokens_B: Array, position: Array, caches: object) -> tuple[Array, object]:
                return attached.model.decode_step(
                    tokens_B,
                    position,
                    caches,  # type: ignore[arg-type]
                    cross,
                    encoded.mask_BU,
                    slots=rest,
                )

            rows = len(tokens_BT)
            return replicate(
                greedy(step, caches, num_rows=rows, max_length=max_length, limit_N=limit_B)
            )

    def _attached(self, params: FlatParams, tuned: FlatParams) -> Attached:
        frozen = {f"model/{name}": array for name, array in params.items()}
        return tree.merge(self.structure.graphdef, {**frozen, **tuned})

    def _own_scores(self, attached: Attached, tokens_BT: Array, targets_BCS: Array) -> Array:
        own = self.structure.own_labels
        labels_LS = np.zeros((len(own), max(map(len, own))), np.int32)
        for label_S, ids in zip(labels_LS, own, strict=True):
            label_S[: len(ids)] = ids
        scores_BL = attached.label_scores(tokens_BT, jnp.asarray(labels_LS))
        batch, number, length = targets_BCS.shape
        same = same_tokens(targets_BCS.reshape(-1, length), own)
        same_BCL = same.reshape(batch, number, len(own))
        chosen_BC = jnp.take_along_axis(scores_BL, jnp.argmax(same_BCL, axis=-1), axis=1)
        return jnp.where(same_BCL.any(axis=-1), chosen_BC, NEVER)


class Methods:
    """The structures, and the tuned arrays that the device holds of ``most`` methods at once.

    Used by one thread.
    """

    def __init__(
        self,
        methods: Sequence[ServedMethod],
        *,
        shapes: Shapes,
        most: int,
        layout: Layout | None = None,
    ) -> None:
        # One of each structure, to be timed with.
        self._one_of = {method.structure: method for method in methods}
        self._shapes, self._most, self._layout = shapes, most, layout
        self._held: OrderedDict[int, dict[str, Array]] = OrderedDict()

    def programs(self) -> Iterator[Program]:
        """All that there are."""
        return chain.from_iterable(map(self._shapes.programs_of, self._one_of))

    def one_of(self, structure: Structure | None) -> ServedMethod | None:
        """Any with this structure; None for plain prompts."""
        return None if structure is None else self._one_of[structure]

    def name_of(self, program: Program) -> str:
        """What is said while it is compiled."""
        assert program.structure is not None
        method = self._one_of[program.structure].method
        return f"{program.kind} {program.rows} x {program.length} tokens of {method}"

    def function(self, program: Program) -> Any:
        """What is to be compiled."""
        assert program.structure is not None
        functions = MethodPrograms(program.structure, self._layout)
        if program.targets is not None:
            return jax.jit(functions.score)
        return jax.jit(partial(functions.write, max_length=self._shapes.max_new_tokens))

    def tuned_of(self, rows: Sequence[Row]) -> dict[str, Array]:
        """By path, of the one method of all rows; the least recently used makes room for it."""
        (method,) = {row.method for row in rows}
        assert method is not None
        if method.number not in self._held:
            while len(self._held) >= self._most:
                self._held.popitem(last=False)
            axes = method.structure.axes
            self._held[method.number] = {
                name: placed(array, axes[name], self._layout)
                for name, array in method.tuned.items()
            }
        self._held.move_to_end(method.number)
        return self._held[method.number]

    def like(self, program: Program) -> dict[str, jax.ShapeDtypeStruct]:
        """The tuned arrays to compile for."""
        layout, structure = self._layout, program.structure
        assert structure is not None
        if layout is None or layout.is_trivial:
            return dict(structure.shapes)
        return {
            name: jax.ShapeDtypeStruct(
                one.shape,
                one.dtype,
                sharding=layout.sharding(structure.axes[name], one.shape),
            )
            for name, one in structure.shapes.items()
        }
