"""The compiled functions: batches whose rows each have a prompt or trained method.

There is one set of functions for plain prompts and one for each ``AdapterSpec``, all over the same
decode state.  The frozen arrays are the engine's; prompts and trained arrays are arguments, so that
any number of LoRAs of one shape share their programs and their batches.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.analysis.words import nearest_tokens
from prompt_tuning_jax.distributed.sharding import (
    Partitioner,
    activation_sharding,
    replicate,
    with_logical_constraint,
)
from prompt_tuning_jax.inference.decoding.greedy import ends
from prompt_tuning_jax.inference.decoding.logits_processors import LogitsProcessors
from prompt_tuning_jax.inference.decoding.rank import MAX_LOGITS, sequence_log_probs
from prompt_tuning_jax.inference.ensemble import score_known_labels
from prompt_tuning_jax.methods.base import TunedModel
from prompt_tuning_jax.methods.prompt_combine import combine_rows
from prompt_tuning_jax.models.base import Context, DecodeContext, Model
from prompt_tuning_jax.models.config import TokenIds
from prompt_tuning_jax.models.injections import NO_INJECTIONS, Injections
from prompt_tuning_jax.models.output_head import LazyLogits
from prompt_tuning_jax.serving.decode_state import KEY_AXES, DecodeOutput, DecodeState
from prompt_tuning_jax.serving.shapes import DecodeOptions
from prompt_tuning_jax.serving.tasks import AdapterSpec
from prompt_tuning_jax.typing import Array, FlatParams

# The fields of a DecodeState that decoding changes.
_DECODED = ("caches", "token_M", "position_M", "score_M", "done_M", "ids_MS")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Batch:
    """Inputs, and for each the row of the cache that holds its prompt or method.

    ``prompt_length_B`` is 0 for the bare model; ``placement_B`` indexes ``PLACEMENTS``.  Methods
    need neither.
    """

    tokens_BT: Any
    row_B: Any
    prompt_length_B: Any
    placement_B: Any


@dataclass(frozen=True)
class Programs:
    """The functions for plain prompts, or for methods of one spec; each is pure.

    ``arrays`` are those of the cache: of ``held_prompts``; the trained arrays ``[N, ...]`` of N
    methods by path, from which rows are ``gathered``; or else those of the one method of all rows.
    """

    graphdef: nnx.GraphDef[Any]  # of the model, or of the model with its method
    token_ids: TokenIds
    adapter_spec: AdapterSpec | None = None
    gathered: bool = True
    partitioner: Partitioner | None = None

    def score(
        self,
        params: FlatParams,
        arrays: Any,
        batch: Batch,
        targets_BCS: Array,
        *,
        prompt_length: int = 0,
    ) -> Array:
        """Returns ``[B, C]``: summed log-probabilities of each row's targets, as in ranking.

        A method that scores labels itself knows only its labels; any other target is impossible.
        """
        copies = len(batch.tokens_BT) if self._gathers else 1
        with activation_sharding(self.partitioner):

            def score(arrays: Any, batch: Batch, targets_BCS: Array) -> Array:
                if self.adapter_spec is not None and self.adapter_spec.label_tokens:
                    attached = self._attached(params, arrays)
                    return score_known_labels(attached, batch.tokens_BT, targets_BCS)
                model, context, injections = self._read(params, arrays, batch, prompt_length)

                def logits_of(targets_BS: Array) -> LazyLogits:
                    hidden_BSD = model.write_hidden(context, targets_BS, injections=injections)
                    return model.lazy_logits(hidden_BSD)

                return _scored(
                    logits_of,
                    targets_BCS,
                    vocab_size=model.config.vocab_size,
                    padding=self.token_ids.fill,
                    copies=copies,
                )

            return replicate(self._by_row(score)(arrays, batch, targets_BCS))

    def prefill(
        self,
        params: FlatParams,
        arrays: Any,
        state: DecodeState,
        batch: Batch,
        slot_B: Array,
        options: DecodeOptions,
        *,
        prompt_length: int = 0,
    ) -> DecodeState:
        """Reads rows into slots; a row with a slot number of M or more is dropped."""
        with activation_sharding(self.partitioner):

            def read(arrays: Any, batch: Batch) -> DecodeContext:
                model, context, _ = self._read(params, arrays, batch, prompt_length)
                return model.start_decoding(context, 1)[0]

            context = self._by_row(read)(arrays, batch)
            ids = self.token_ids
            width, length = context.mask_BU.shape[1], batch.tokens_BT.shape[1]

            def put(whole: Array, part: Array) -> Array:
                put = whole.at[slot_B, :width].set(part.astype(whole.dtype), mode="drop")
                return with_logical_constraint(put, KEY_AXES)

            def put_all(whole: Array, part: Any) -> Array:
                return whole.at[slot_B].set(part, mode="drop")

            tokens_MT = put_all(state.tokens_MT, ids.fill)
            mask_MU = put_all(state.context.mask_BU, False)
            first_MD = state.context.first_BD
            if first_MD is not None:
                first_MD = first_MD.at[slot_B].set(context.first_BD, mode="drop")
            return replace(
                state,
                tokens_MT=tokens_MT.at[slot_B, :length].set(batch.tokens_BT, mode="drop"),
                context=DecodeContext(
                    mask_BU=mask_MU.at[slot_B, :width].set(context.mask_BU, mode="drop"),
                    keys_values=jax.tree.map(put, state.context.keys_values, context.keys_values),
                    first_BD=first_MD,
                ),
                token_M=put_all(state.token_M, ids.start),
                position_M=put_all(state.position_M, 0),
                options=jax.tree.map(put_all, state.options, options),
                score_M=put_all(state.score_M, 0.0),
                done_M=put_all(state.done_M, False),
                ids_MS=put_all(state.ids_MS, ids.pad),
            )

    def decode(
        self,
        params: FlatParams,
        arrays: Any,
        state: DecodeState,
        row_M: Array,
        active_M: Array,
        first: Array,
        *,
        slots: int,
        width: int,
        steps: int,
    ) -> tuple[DecodeState, DecodeOutput]:
        """Decodes the most probable token in every active slot, at most ``steps`` times.

        ``slots`` of them from ``first`` on must hold all active slots, and the first ``width``
        encoder positions all that their rows have.  Plain prompts need no ``arrays`` any more.
        """
        with activation_sharding(self.partitioner):

            def window(whole: Array) -> Array:
                if slots == len(whole):
                    return whole
                return lax.dynamic_slice_in_dim(whole, first, slots)

            used: DecodeState = jax.tree.map(window, state)
            keys_values = jax.tree.map(lambda x: x[:, :width], used.context.keys_values)
            mask_MU = used.context.mask_BU[:, :width]
            used = replace(
                used, context=replace(used.context, keys_values=keys_values, mask_BU=mask_MU)
            )
            done_before_M = used.done_M
            used = replace(used, done_M=used.done_M | ~window(active_M))
            decoded = self._decode(params, arrays, used, window(row_M), steps)
            # A slot that is not active is done for these steps only.
            done_M = jnp.where(window(active_M), decoded.done_M, done_before_M)
            decoded = replace(decoded, done_M=done_M)

            def put(whole: Array, part: Array) -> Array:
                if slots == len(whole):
                    return part
                return lax.dynamic_update_slice_in_dim(whole, part, first, 0)

            changed = {
                name: jax.tree.map(put, getattr(state, name), getattr(decoded, name))
                for name in _DECODED
            }
            state = replace(state, **changed)
            output = DecodeOutput(state.ids_MS, state.position_M, state.score_M, state.done_M)
            # A copy: the state itself is donated to the next call.
            return state, jax.tree.map(jnp.copy, replicate(output))

    def _decode(
        self, params: FlatParams, arrays: Any, state: DecodeState, row_M: Array, steps: int
    ) -> DecodeState:
        """Returns the state after these steps, or fewer if all its slots are done."""
        by_row = 0 if self._gathers else None
        if self._gathers:
            arrays = {name: array[row_M] for name, array in arrays.items()}
        ids = self.token_ids

        def injections_of(arrays: Any, tokens_T: Array) -> Injections:
            if self.adapter_spec is None:
                return NO_INJECTIONS
            attached = self._attached(params, arrays)
            return attached.model.injections_for_writing(attached.injections(tokens_T[None]))

        # The same in every step.
        injections_M = jax.vmap(injections_of, in_axes=(by_row, 0))(arrays, state.tokens_MT)

        def step_of_row(
            arrays: Any, injections: Any, token: Any, position: Any, *rest: Any
        ) -> tuple[Array, Any]:
            cache, context = jax.tree.map(lambda x: x[None], rest)
            logits_1V, cache = self._model(params, arrays).decode_step(
                token[None], position, cache, context, injections=injections
            )
            return logits_1V[0], jax.tree.map(lambda x: x[0], cache)

        step_of_rows = jax.vmap(step_of_row, in_axes=(by_row, 0, 0, 0, 0, 0))

        def unfinished(loop: tuple[Array, DecodeState]) -> Array:
            return (loop[0] < steps) & ~jnp.all(loop[1].done_M)

        def step(loop: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
            number, now = loop
            logits_MV, caches = step_of_rows(
                arrays,
                injections_M,
                now.token_M,
                now.position_M,
                now.caches,
                state.context,
            )
            logits_MV = logits_MV.astype(jnp.float32)
            options = now.options.processors
            processors = LogitsProcessors(  # rows that are done ask for nothing
                min_length=jnp.where(now.done_M, 0, options.min_length),
                repetition_penalty=jnp.where(now.done_M, 1, options.repetition_penalty),
                no_repeat_ngram_size=jnp.where(now.done_M, 0, options.no_repeat_ngram_size),
            )
            offered_MV = processors(logits_MV, now.ids_MS, now.position_M, token_ids=ids)
            chosen_M = jnp.argmax(offered_MV, axis=-1).astype(jnp.int32)
            at_chosen_M = jnp.take_along_axis(logits_MV, chosen_M[:, None], axis=-1)[:, 0]
            log_prob_M = at_chosen_M - jax.nn.logsumexp(logits_MV, axis=-1)
            running_M = ~now.done_M
            at_M = jnp.where(running_M, now.position_M, now.ids_MS.shape[1])
            position_M = now.position_M + running_M
            ended_M = ends(chosen_M, ids) | (position_M >= now.options.limit_B)
            every = jnp.arange(len(chosen_M))
            return number + 1, replace(
                now,
                caches=caches,
                token_M=jnp.where(running_M, chosen_M, now.token_M),
                position_M=position_M,
                score_M=now.score_M + jnp.where(running_M, log_prob_M, 0.0),
                done_M=now.done_M | ended_M,
                ids_MS=now.ids_MS.at[every, at_M].set(chosen_M, mode="drop"),
            )

        _, state = lax.while_loop(unfinished, step, (jnp.int32(0), state))
        return state

    def nearest_words(
        self, params: FlatParams, prompt_PD: Array, *, number: int
    ) -> tuple[Array, Array]:
        """Ids and cosines ``[P, number]`` of the token embeddings most similar to each position."""
        with activation_sharding(self.partitioner):
            model = self._model(params, None)
            every = jnp.arange(model.config.vocab_size)
            table_VD = model.embedding_table()[every]
            return replicate(nearest_tokens(prompt_PD, table_VD, number=number))

    @property
    def _gathers(self) -> bool:
        """Whether each row has its own trained arrays; prompts are gathered by ``combine_rows``."""
        return self.gathered and self.adapter_spec is not None

    def _by_row(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns ``function(arrays, batch, ...)`` for arrays of which each row gathers its own."""
        if not self._gathers:
            return function

        def of_rows(arrays: FlatParams, batch: Batch, *others: Any) -> Any:
            arrays_B = {name: array[batch.row_B] for name, array in arrays.items()}

            def of_row(arrays: FlatParams, *row: Any) -> Any:
                batched = jax.tree.map(lambda x: x[None], row)
                return jax.tree.map(lambda x: x[0], function(arrays, *batched))

            return jax.vmap(of_row)(arrays_B, batch, *others)

        return of_rows

    def _read(
        self, params: FlatParams, arrays: Any, batch: Batch, prompt_length: int
    ) -> tuple[Model, Context, Injections]:
        """Returns the model, what it has read, and what is injected when it writes."""
        if self.adapter_spec is not None:
            attached = self._attached(params, arrays)
            return attached.model, *attached.read(batch.tokens_BT)
        model = self._model(params, arrays)
        if model.config.reads_images:
            return model, model.read(model.embed(batch.tokens_BT)), NO_INJECTIONS
        if model.causal:
            prompt_arrays = jax.tree.map(lambda x: x[:, :prompt_length][batch.row_B], arrays)
            injections = Injections(
                prefixes={model.reading_stack: prompt_arrays},
                prefix_lengths_B=batch.prompt_length_B,
            )
            source = model.embed(batch.tokens_BT)
            return model, model.read(source, injections=injections), NO_INJECTIONS
        joined = combine_rows(
            arrays[:, arrays.shape[1] - prompt_length :][batch.row_B],
            model.embed(batch.tokens_BT),
            batch.tokens_BT,
            length_B=batch.prompt_length_B,
            placement_B=batch.placement_B,
            eos_id=model.input_eos,
        )
        embeddings_BUD = with_logical_constraint(joined.embeddings_BUD, ("batch", None, None))
        source = replace(joined, embeddings_BUD=embeddings_BUD)
        return model, model.read(source), NO_INJECTIONS

    def _model(self, params: FlatParams, arrays: Any) -> Model:
        if self.adapter_spec is None:
            model: Model = param_tree.merge(self.graphdef, params)
            return model
        return self._attached(params, arrays).model

    def _attached(self, params: FlatParams, arrays: FlatParams) -> TunedModel:
        frozen = {f"model/{name}": array for name, array in params.items()}
        attached: TunedModel = param_tree.merge(self.graphdef, {**frozen, **arrays})
        return attached


def held_prompts(graphdef: nnx.GraphDef[Model], params: FlatParams, prompts_KPD: Array) -> Any:
    """Returns what the cache holds of prompts: their keys and values if those suffice."""
    model: Model = param_tree.merge(graphdef, params)
    if not model.causal:
        return prompts_KPD
    nothing_K0 = jnp.zeros((len(prompts_KPD), 0), jnp.int32)
    return model.read(model.embed(nothing_K0, prompts_KPD)).prompt


def _scored(
    logits_of: Callable[[Array], LazyLogits],
    targets_BCS: Array,
    *,
    vocab_size: int,
    padding: int,
    copies: int,
) -> Array:
    """Returns ``[B, C]``: summed log-probabilities.

    ``logits_of`` predicts one target ``[B, S]`` a row.

    ``copies`` is how often a ``vmap`` around it computes this at once.
    """
    batch, number, length = targets_BCS.shape
    at_once = min(max(1, MAX_LOGITS // (copies * batch * length * vocab_size)), number)

    def one(targets_BS: Array) -> Array:
        lazy = replace(logits_of(targets_BS), copies=copies * at_once)
        return sequence_log_probs(lazy, targets_BS, padding=padding)

    targets_CBS = targets_BCS.swapaxes(0, 1)
    if at_once == number:
        return jax.vmap(one)(targets_CBS).T
    return lax.map(one, targets_CBS, batch_size=at_once).T
