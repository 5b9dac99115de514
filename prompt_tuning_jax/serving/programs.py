"""The compiled functions: a batch whose rows each have a prompt of their own.

N rows of the cache of prompts, M slots that are written to at once, G steps of writing in one call.
A prompt stands right before its input's tokens, and what pads it stands in front of both and is
hidden: positions are relative in T5, so each row computes what it computes alone.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.distributed.sharding import (
    Partitioner,
    activation_sharding,
    replicate,
    with_logical_constraint,
)
from prompt_tuning_jax.inference.decoding.logits_processors import LogitsProcessors
from prompt_tuning_jax.methods.prompt_combine import combine_rows
from prompt_tuning_jax.models.injections import NO_INJECTIONS
from prompt_tuning_jax.models.t5.model import T5, Encoded
from prompt_tuning_jax.serving.decode_state import KEYS, DecodeState, Written
from prompt_tuning_jax.serving.prompt_position import scored
from prompt_tuning_jax.serving.rows import WriteOptions
from prompt_tuning_jax.typing import Array, FlatParams

_WRITTEN = ("caches", "token_M", "position_M", "score_M", "done_M", "ids_MS")  # of a DecodeState


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Rows:
    """Inputs, and for each the row of the cache that holds its prompt.

    ``prompt_length_B`` is 0 for the bare model; ``placement_B`` counts in ``PLACEMENTS``.
    """

    tokens_BT: Any
    prompt_B: Any
    prompt_length_B: Any
    placement_B: Any


@dataclass(frozen=True)
class Programs:
    """The functions for one model; each is pure, and compiled by the engine."""

    graphdef: nnx.GraphDef[T5]
    partitioner: Partitioner | None = None

    def score(
        self,
        params: FlatParams,
        prompts_NPD: Array,
        rows: Rows,
        targets_BCS: Array,
        *,
        prompt_length: int,
    ) -> Array:
        """``[B, C]``: summed log-probabilities; the encoder reads each row once."""
        with activation_sharding(self.partitioner):
            model = param_tree.merge(self.graphdef, params)
            encoded = read(model, prompts_NPD, rows, prompt_length=prompt_length)
            cross = model.decoder.cross_keys(encoded)

            def logits_of(shifted_BS: Array) -> Array:
                x_BSD, _ = model.decoder(
                    model.embed_tokens(shifted_BS),
                    cross,
                    encoded.mask_BU,
                    injections=NO_INJECTIONS,
                    key=None,
                )
                return model.logits(x_BSD)

            vocabulary = model.config.vocab_size
            made = scored(logits_of, targets_BCS, vocab_size=vocabulary, token_ids=model.token_ids)
            return replicate(made)

    def prefill(
        self,
        params: FlatParams,
        prompts_NPD: Array,
        table: DecodeState,
        rows: Rows,
        slot_B: Array,
        options: WriteOptions,
        *,
        prompt_length: int,
    ) -> DecodeState:
        """Reads rows into slots; a slot number of M or more is nowhere, and its row is lost."""
        with activation_sharding(self.partitioner):
            model = param_tree.merge(self.graphdef, params)
            encoded = read(model, prompts_NPD, rows, prompt_length=prompt_length)
            width = encoded.mask_BU.shape[1]

            def put(whole: Array, part: Array) -> Array:
                put = whole.at[slot_B, :width].set(part.astype(whole.dtype), mode="drop")
                return with_logical_constraint(put, KEYS)

            hidden_B = jnp.zeros(slot_B.shape, jnp.int32)
            mask_MU = table.mask_MU.at[slot_B].set(False, mode="drop")
            return replace(
                table,
                cross=jax.tree.map(put, table.cross, model.decoder.cross_keys(encoded)),
                mask_MU=mask_MU.at[slot_B, :width].set(encoded.mask_BU, mode="drop"),
                token_M=table.token_M.at[slot_B].set(model.token_ids.start, mode="drop"),
                position_M=table.position_M.at[slot_B].set(hidden_B, mode="drop"),
                options=jax.tree.map(
                    lambda whole, part: whole.at[slot_B].set(part, mode="drop"),
                    table.options,
                    options,
                ),
                score_M=table.score_M.at[slot_B].set(0.0, mode="drop"),
                done_M=table.done_M.at[slot_B].set(False, mode="drop"),
                ids_MS=table.ids_MS.at[slot_B].set(model.token_ids.pad, mode="drop"),
            )

    def write(
        self,
        params: FlatParams,
        table: DecodeState,
        given_up_M: Array,
        *,
        slots: int,
        width: int,
        steps: int,
    ) -> tuple[DecodeState, Written]:
        """Writes the most probable token in every slot that is not done, ``steps`` times at most.

        Slots that are ``given_up`` are done.  The first ``slots`` must hold all that are not, and
        the first ``width`` positions, at which the decoder looks, all that was read.
        """
        with activation_sharding(self.partitioner):
            model = param_tree.merge(self.graphdef, params)
            table = replace(table, done_M=table.done_M | given_up_M)
            used: DecodeState = jax.tree.map(lambda x: x[:slots], table)
            cross = jax.tree.map(lambda x: x[:, :width], used.cross)
            used = replace(used, cross=cross, mask_MU=used.mask_MU[:, :width])

            def step_of_one(token: Any, position: Any, cache: Any, cross: Any, mask: Any) -> Any:
                cache, cross = jax.tree.map(lambda x: x[None], (cache, cross))
                logits, cache = model.decode_step(
                    token[None], position, cache, cross, mask[None], injections=NO_INJECTIONS
                )
                return logits[0], jax.tree.map(lambda x: x[0], cache)

            def unfinished(state: tuple[Array, DecodeState]) -> Array:
                return (state[0] < steps) & ~jnp.all(state[1].done_M)

            def step(state: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
                number, table = state
                logits_MV, caches = jax.vmap(step_of_one)(
                    table.token_M, table.position_M, table.caches, table.cross, table.mask_MU
                )
                logits_MV = logits_MV.astype(jnp.float32)
                asked = table.options.processors
                processors = LogitsProcessors(  # rows that are done ask for nothing
                    min_length=jnp.where(table.done_M, 0, asked.min_length),
                    repetition_penalty=jnp.where(table.done_M, 1, asked.repetition_penalty),
                    no_repeat_ngram_size=jnp.where(table.done_M, 0, asked.no_repeat_ngram_size),
                )
                offered_MV = processors(
                    logits_MV, table.ids_MS, table.position_M, token_ids=model.token_ids
                )
                chosen_M = jnp.argmax(offered_MV, axis=-1).astype(jnp.int32)
                at_chosen_M = jnp.take_along_axis(logits_MV, chosen_M[:, None], axis=-1)[:, 0]
                log_prob_M = at_chosen_M - jax.nn.logsumexp(logits_MV, axis=-1)
                going_M = ~table.done_M
                every = jnp.arange(len(chosen_M))
                at_M = jnp.where(going_M, table.position_M, table.ids_MS.shape[1])
                position_M = table.position_M + going_M
                ended_M = chosen_M == model.token_ids.eos
                return number + 1, replace(
                    table,
                    caches=caches,
                    token_M=jnp.where(going_M, chosen_M, model.token_ids.pad),
                    position_M=position_M,
                    score_M=table.score_M + jnp.where(going_M, log_prob_M, 0.0),
                    done_M=table.done_M | ended_M | (position_M >= table.options.limit_B),
                    ids_MS=table.ids_MS.at[every, at_M].set(chosen_M, mode="drop"),
                )

            _, used = lax.while_loop(unfinished, step, (jnp.int32(0), used))
            changed = {
                name: jax.tree.map(
                    lambda whole, part: whole.at[:slots].set(part),
                    getattr(table, name),
                    getattr(used, name),
                )
                for name in _WRITTEN
            }
            table = replace(table, **changed)
            seen = Written(table.ids_MS, table.position_M, table.score_M, table.done_M)
            # Its own copy: the table itself is given away to the next call.
            return table, jax.tree.map(jnp.copy, replicate(seen))

    def nearest_words(
        self, params: FlatParams, prompt_PD: Array, *, number: int
    ) -> tuple[Array, Array]:
        """Ids and cosines ``[P, number]`` of the token embeddings most like each position."""
        with activation_sharding(self.partitioner):
            model = param_tree.merge(self.graphdef, params)
            everything = jnp.arange(model.config.vocab_size)
            table_VD = model.token_embedder.table()[everything].astype(jnp.float32)
            cosine_PV = _unit(prompt_PD.astype(jnp.float32)) @ _unit(table_VD).T
            cosines, ids = lax.top_k(cosine_PV, number)
            return replicate((ids, cosines))


def read(model: T5, prompts_NPD: Array, rows: Rows, *, prompt_length: int) -> Encoded:
    """The encoder's output over each input with its prompt of at most ``prompt_length``."""
    prompt_BPD = prompts_NPD[:, prompts_NPD.shape[1] - prompt_length :][rows.prompt_B]
    joined = combine_rows(
        prompt_BPD,
        model.embed(rows.tokens_BT),
        rows.tokens_BT,
        length_B=rows.prompt_length_B,
        placement_B=rows.placement_B,
        eos_id=model.input_eos,
    )
    embeddings_BUD = with_logical_constraint(joined.embeddings_BUD, ("batch", None, None))
    joined = replace(joined, embeddings_BUD=embeddings_BUD)
    return model.encoder(joined, injections=NO_INJECTIONS, key=None)


def _unit(x: Array) -> Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-9)
