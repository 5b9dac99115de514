"""Jitted programs for E ensemble members on one frozen model, and their majority vote.

The trainable arrays of a method have a leading axis E, with one entry per member; the frozen arrays
are shared.  The vote follows Lester et al. 2021, section 6.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.distributed.sharding import (
    Partitioner,
    activation_sharding,
    replicate,
    spans_devices,
)
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.decoding.beam import BeamRule, T5XRule, beam_search
from prompt_tuning_jax.inference.decoding.greedy import greedy
from prompt_tuning_jax.inference.decoding.logits_processors import LogitsProcessors
from prompt_tuning_jax.inference.decoding.rank import MAX_LOGITS, rank, sequence_log_probs
from prompt_tuning_jax.inference.decoding.sampling import sample
from prompt_tuning_jax.methods.base import UNKNOWN_LABEL_LOG_PROB, TunedModel, same_tokens
from prompt_tuning_jax.models.base import DecodeContext, Model
from prompt_tuning_jax.models.config import ModelConfig
from prompt_tuning_jax.models.injections import Injections
from prompt_tuning_jax.models.layers import Remat, split_key
from prompt_tuning_jax.models.output_head import LazyLogits
from prompt_tuning_jax.typing import Array, FlatParams, HostArray


@dataclass(frozen=True, kw_only=True)
class Vote:
    """The ensemble's prediction for one example, and the number of members that gave each text."""

    prediction: str
    votes: Mapping[str, int]


def majority_vote(predictions_E: Sequence[str], log_probs_E: Sequence[Mapping[str, float]]) -> Vote:
    """Returns the text that most members predict.

    A tie goes to the candidate with the larger log-probability summed over the members.
    ``log_probs_E`` holds each member's log-probability by text.  When ranking it covers all labels;
    when generating it covers only the member's prediction, so only a candidate's voters count.
    Equal sums go to the alphabetically first text, so the order of the members does not matter.
    """
    votes = Counter(predictions_E)
    most = max(votes.values())

    def summed(text: str) -> float:
        # fsum rounds exactly, so the order of the members cannot break a tie.
        return math.fsum(known[text] for known in log_probs_E if text in known)

    tied = [text for text, count in votes.items() if count == most]
    winner = min(tied, key=lambda text: (-summed(text), text))
    return Vote(prediction=winner, votes=dict(votes))


# The limit for the largest activation; beyond the cache, every operation goes through memory.
# Measured on two cores with 2 MB of cache each and 32 MB shared, a step of the small size took
# 1.09 s with 20 MB, 1.03 s with 10, 0.93 s with 5 and 0.95 s with 2.5 in bfloat16.  In float32 it
# took 1.60 s with 20 MB and 1.35 s with 5.
_CACHE_BYTES = 6_000_000
_FLOAT32_BYTES = 4


def rows_in_cache(config: ModelConfig, length: int) -> int:
    """Returns the number of ``length``-token rows whose largest activation fits a CPU's cache."""
    widest = max(config.mlp_dim, config.embed_dim, config.num_heads * length)
    return _CACHE_BYTES // (length * widest * _FLOAT32_BYTES)


def members_per_chunk(config: ModelConfig, members: int, rows: int, length: int) -> int:
    """Returns the largest divisor of ``members`` whose ``[rows, length]`` batches fit the cache."""
    most = rows_in_cache(config, length) // rows
    return max(n for n in range(1, members + 1) if members % n == 0 and (n == 1 or n <= most))


def map_members(function: Callable[..., Any], *arrays: Any, members: int, chunk_size: int) -> Any:
    """Maps ``function`` over the leading axis E of the arrays.

    Like ``jax.lax.map`` with a batch size: the members of a chunk are vectorized, and the chunks
    run one after another.
    """
    if chunk_size >= members:
        return jax.vmap(function, axis_size=members)(*arrays)
    batch_size = chunk_size if chunk_size > 1 else None
    return jax.lax.map(lambda member: function(*member), arrays, batch_size=batch_size)


Strategy: TypeAlias = Literal["greedy", "beam", "sample"]


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Settings for text generation; static, so each combination is compiled once."""

    strategy: Strategy = "greedy"
    max_length: int = 32
    num_beams: int = 4
    beam_rule: BeamRule = field(default_factory=T5XRule)
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def score_labels(
    tuned: TunedModel,
    tokens_BT: Array | HostArray,
    labels_CS: Array | HostArray,
    *,
    task_B: Array | HostArray | None = None,
    key: Array | None = None,
    remat: Remat = "none",
    copies: int = 1,
    normalize_length: bool = False,
) -> Array:
    """Returns ``[B, C]``: the log-probability of each label, for ranking; see ``decoding.rank``.

    The model reads each example once for all labels.  A ``key`` enables dropout.  ``copies`` is how
    often a ``vmap`` around it computes this at once.  ``normalize_length`` returns the mean over
    the label's tokens.  If the method scores labels itself, only ``task_B`` has an effect.
    """
    if tuned.method.label_tokens:
        targets_BCS = jnp.broadcast_to(labels_CS, (len(tokens_BT), *labels_CS.shape))
        return score_known_labels(tuned, tokens_BT, targets_BCS, task_B=task_B)
    model = tuned.model if key is None else tuned.method.with_dropout(tuned.model, key=key)
    # As in ``run_hidden``: the encoder's dropout and the decoder's are independent.
    read_key, write_key = split_key(key, 2)
    context, injections = TunedModel(model, tuned.method).read(
        tokens_BT, task_B=task_B, key=read_key, method_key=key, remat=remat
    )

    def label_logits(label_S: Array) -> LazyLogits:
        targets_BS = jnp.broadcast_to(label_S, (len(tokens_BT), *label_S.shape))
        hidden_BSD = model.write_hidden(
            context, targets_BS, injections=injections, key=write_key, remat=remat
        )
        return replace(model.lazy_logits(hidden_BSD), copies=copies)

    return rank(
        label_logits,
        labels_CS,
        normalize_length=normalize_length,
        padding=model.token_ids.fill,
        max_logits=MAX_LOGITS // copies,
    )


def score_known_labels(
    tuned: TunedModel,
    tokens_BT: Array | HostArray,
    targets_BCS: Array,
    *,
    task_B: Array | HostArray | None = None,
) -> Array:
    """Returns ``[B, C]``: the log-probabilities of a method that scores its labels itself.

    Each row has its own targets; one that is not a label gets ``UNKNOWN_LABEL_LOG_PROB``.
    """
    known = tuned.method.label_tokens
    log_probs_BL = jax.nn.log_softmax(tuned.label_logits(tokens_BT, task_B=task_B))
    batch, number, length = targets_BCS.shape
    targets_XS = targets_BCS.reshape(-1, length)
    same_XL = same_tokens(targets_XS, known, padding=tuned.model.token_ids.fill)
    same_BCL = same_XL.reshape(batch, number, len(known))
    chosen_BC = jnp.take_along_axis(log_probs_BL, jnp.argmax(same_BCL, axis=-1), axis=1)
    return jnp.where(same_BCL.any(axis=-1), chosen_BC, UNKNOWN_LABEL_LOG_PROB)


@partial(jax.jit, static_argnums=(0, 5, 6, 8))
def label_scores(
    graphdef: nnx.GraphDef[TunedModel],
    trainable: FlatParams,
    frozen: FlatParams,
    tokens_BT: Array,
    labels_CS: Array,
    members: int,
    partitioner: Partitioner | None = None,
    task_B: Array | HostArray | None = None,
    normalize_length: bool = False,
) -> Array:
    """Returns ``[E, B, C]``: the summed log-probability of each label string.

    The model reads each example once per member.  ``members``
    is E, which cannot be inferred for a method without tuned arrays.  ``task_B`` is each row's
    task, for methods that need it.  ``normalize_length`` returns the mean over a label's tokens.
    On a mesh the result is replicated.
    """
    chunk_size = _chunk_size(graphdef, trainable, frozen, tokens_BT, members, partitioner)

    def member(params: FlatParams) -> Array:
        attached = param_tree.merge(graphdef, {**frozen, **params})
        return score_labels(
            attached,
            tokens_BT,
            labels_CS,
            task_B=task_B,
            copies=chunk_size,
            normalize_length=normalize_length,
        )

    with activation_sharding(partitioner):
        return replicate(map_members(member, trainable, members=members, chunk_size=chunk_size))


@partial(jax.jit, static_argnums=(0, 1, 6))
def write(
    graphdef: nnx.GraphDef[TunedModel],
    writing: DecodeConfig,
    trainable: FlatParams,
    frozen: FlatParams,
    tokens_BT: Array,
    key: Array,
    partitioner: Partitioner | None = None,
    task_B: Array | HostArray | None = None,
    processors: LogitsProcessors | None = None,
) -> tuple[Array, Array]:
    """Generates text: returns ids ``[E, B, S]`` and scores ``[E, B]``.

    Beam search adds an axis K after B.  All members are decoded together, so the decoder gets
    E * B rows.  A method without tuned arrays counts as one member.  On a mesh the results are
    replicated.
    """
    members = len(next(iter(trainable.values()))) if trainable else 1
    chunk_size = _chunk_size(graphdef, trainable, frozen, tokens_BT, members, partitioner)
    with activation_sharding(partitioner):
        return replicate(
            _write(
                graphdef, writing, trainable, frozen, tokens_BT, key, task_B, chunk_size, processors
            )
        )


def abstract_model(
    graphdef: nnx.GraphDef[TunedModel], trainable: FlatParams, frozen: FlatParams
) -> Model:
    """Returns the model of one member, with shapes in place of arrays.

    Its config and its vocabulary are those of the members.
    """
    return abstract_member(graphdef, trainable, frozen).model


def abstract_member(
    graphdef: nnx.GraphDef[TunedModel], trainable: FlatParams, frozen: FlatParams
) -> TunedModel:
    """Returns one member with shapes in place of arrays, none of which is copied."""
    shapes: Any = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in frozen.items()}
    shapes |= {name: jax.ShapeDtypeStruct(a.shape[1:], a.dtype) for name, a in trainable.items()}
    return param_tree.merge(graphdef, shapes)


def _chunk_size(
    graphdef: nnx.GraphDef[TunedModel],
    trainable: FlatParams,
    frozen: FlatParams,
    tokens_BT: Array,
    members: int,
    partitioner: Partitioner | None,
) -> int:
    """Returns the chunk size for ``map_members``: limited by the cache on a CPU, else E."""
    if members == 1 or spans_devices(partitioner) or jax.default_backend() != "cpu":
        return members
    config = abstract_model(graphdef, trainable, frozen).config
    length = config.input_positions(tokens_BT.shape[1])
    return members_per_chunk(config, members, tokens_BT.shape[0], length)


def _write(
    graphdef: nnx.GraphDef[TunedModel],
    writing: DecodeConfig,
    trainable: FlatParams,
    frozen: FlatParams,
    tokens_BT: Array,
    key: Array,
    task_B: Array | HostArray | None,
    chunk_size: int,
    processors: LogitsProcessors | None,
) -> tuple[Array, Array]:
    members = len(next(iter(trainable.values()))) if trainable else 1
    batch = tokens_BT.shape[0]
    rows = members * batch

    def start(params: FlatParams) -> tuple[DecodeContext, Injections, Any]:
        attached = param_tree.merge(graphdef, {**frozen, **params})
        if attached.method.label_tokens:
            raise UserError(
                "this method ranks labels and writes no text; use evaluation.strategy=rank, and "
                "data.labels where the task has none"
            )
        context, injections = attached.read(tokens_BT, task_B=task_B)
        kept, caches = attached.model.start_decoding(context, writing.max_length)
        constant = (kept, injections)
        if writing.strategy == "beam":  # the beams of one example are adjacent
            constant = jax.tree.map(
                lambda x: jnp.repeat(x, writing.num_beams, axis=0) if len(x) == batch else x,
                constant,
            )
        return *constant, caches

    context, injections, caches = map_members(
        start, trainable, members=members, chunk_size=chunk_size
    )

    def step(tokens_N: Array, position: Array, cache: Any) -> tuple[Array, Any]:
        def member(
            params: FlatParams,
            tokens: Array,
            cache: Any,
            context: DecodeContext,
            injections: Injections,
        ) -> tuple[Array, Any]:
            attached = param_tree.merge(graphdef, {**frozen, **params})
            return attached.model.decode_step(
                tokens, position, cache, context, injections=injections
            )

        tokens, cache = jax.tree.map(
            lambda x: x.reshape(members, -1, *x.shape[1:]), (tokens_N, cache)
        )
        logits, cache = jax.vmap(member)(trainable, tokens, cache, context, injections)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (logits, cache))

    cache = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), caches)
    size: dict[str, Any] = {
        "num_rows": rows,
        "max_length": writing.max_length,
        "token_ids": abstract_model(graphdef, trainable, frozen).token_ids,
        "processors": processors,
    }
    if writing.strategy == "beam":
        beams = beam_search(
            step, cache, num_beams=writing.num_beams, rule=writing.beam_rule, **size
        )
        ids, scores = beams.ids_NKS, beams.scores_NK
    elif writing.strategy == "sample":
        decoded = sample(
            step,
            cache,
            key=key,
            temperature=writing.temperature,
            top_k=writing.top_k,
            top_p=writing.top_p,
            **size,
        )
        ids, scores = decoded.ids_NS, decoded.scores_N
    else:
        decoded = greedy(step, cache, **size)
        ids, scores = decoded.ids_NS, decoded.scores_N
    return (
        ids.reshape(members, batch, *ids.shape[1:]),
        scores.reshape(members, batch, *scores.shape[1:]),
    )


@partial(jax.jit, static_argnums=(0, 4, 5))
def loss_sums(
    graphdef: nnx.GraphDef[TunedModel],
    trainable: FlatParams,
    frozen: FlatParams,
    batch: Mapping[str, Array | HostArray],
    members: int,
    partitioner: Partitioner | None = None,
    task_B: Array | HostArray | None = None,
) -> tuple[Array, Array]:
    """Returns the summed cross entropy of a batch's targets and their token count, ``[E]`` each.

    The loss is the training loss without dropout and z-loss.  On a mesh the results are replicated.
    """
    tokens_BT = jnp.asarray(batch["inputs"])
    chunk_size = _chunk_size(graphdef, trainable, frozen, tokens_BT, members, partitioner)

    def member(params: FlatParams) -> tuple[Array, Array]:
        attached = param_tree.merge(graphdef, {**frozen, **params})
        sums = attached.token_sums(tokens_BT, batch["targets"], task_B=task_B, copies=chunk_size)
        return sums.loss, sums.tokens

    with activation_sharding(partitioner):
        summed: tuple[Array, Array] = replicate(
            map_members(member, trainable, members=members, chunk_size=chunk_size)
        )
        return summed


@partial(jax.jit, static_argnums=(0, 5))
def target_scores(
    graphdef: nnx.GraphDef[TunedModel],
    trainable: FlatParams,
    frozen: FlatParams,
    tokens_BT: Array,
    targets_BS: Array,
    normalize_length: bool = False,
) -> Array:
    """Returns ``[E, B]``: the summed log-probability of each row's target.

    ``normalize_length`` returns the mean over its tokens.
    """

    def member(params: FlatParams) -> Array:
        attached = param_tree.merge(graphdef, {**frozen, **params})
        if attached.method.label_tokens:
            return score_known_labels(attached, tokens_BT, targets_BS[:, None])[:, 0]
        return sequence_log_probs(
            attached.lazy_logits(tokens_BT, targets_BS),
            targets_BS,
            padding=attached.model.token_ids.fill,
            normalize_length=normalize_length,
        )

    return jax.vmap(member, axis_size=1)(trainable)


@partial(jax.jit, static_argnums=0)
def target_logits(
    graphdef: nnx.GraphDef[TunedModel], params: FlatParams, tokens_BT: Array, targets_BS: Array
) -> Array:
    """Returns one member's float32 logits ``[B, S, V]`` that predict the targets."""
    logits_BSV: Array = param_tree.merge(graphdef, params)(tokens_BT, targets_BS)
    return logits_BSV.astype(jnp.float32)


@partial(jax.jit, static_argnums=0)
def input_logits(graphdef: nnx.GraphDef[TunedModel], params: FlatParams, tokens_BT: Array) -> Array:
    """Returns one member's float32 logits ``[B, T, V]`` at each position of the input."""
    attached = param_tree.merge(graphdef, params)
    logits_BTV: Array = attached.model.logits(attached.read(tokens_BT)[0].hidden_BUD)
    return logits_BTV.astype(jnp.float32)


@partial(jax.jit, static_argnums=0)
def encoded(graphdef: nnx.GraphDef[TunedModel], params: FlatParams, tokens_BT: Array) -> Array:
    """Returns one member's final hidden states ``[B, U, D]`` of the input."""
    hidden_BUD: Array = param_tree.merge(graphdef, params).read(tokens_BT)[0].hidden_BUD
    return hidden_BUD
