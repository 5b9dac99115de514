"""Beam search, with the scoring and stopping rules of T5X or of Hugging Face."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.decoding.greedy import (
    T5_IDS,
    Cache,
    StepFn,
    check_max_length,
    ends,
)
from prompt_tuning_jax.inference.decoding.logits_processors import LogitsProcessors
from prompt_tuning_jax.models.config import TokenIds
from prompt_tuning_jax.typing import Array

# The score of a slot without a hypothesis, whose ids are padding.  The value is from T5X.
UNUSED_SCORE = -1e7


@dataclass(frozen=True, kw_only=True)
class T5XRule:
    """Scores n tokens, including the end, by log-probability / ((5 + n) / 6) ** alpha.

    A row returns unfinished hypotheses only if none has finished; their score is then the
    log-probability.  A row stops when no live hypothesis can still beat its worst finished one.
    Source: ``beam_search`` in t5x/decoding.py, which returns the worst first.  The penalty is from
    Wu et al. 2016, section 7.
    """

    alpha: float = 0.6

    # Whether any of the candidates of a step may finish, rather than only the first K.
    spares_finish: ClassVar[bool] = True
    # Whether hypotheses cut off at the maximum length compete with finished ones.
    cut_off_compete: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise UserError(f"beam rule: alpha is {self.alpha}: it must be 0 or more")

    def score(self, log_probs: Array | float, length: Array | int) -> Array:
        """Scores hypotheses of ``length`` tokens, the end included."""
        return log_probs / ((5.0 + length) / 6.0) ** self.alpha

    def log_probs(self, scores_N: Array, ids_NS: Array, token_ids: TokenIds) -> Array:
        """Inverts ``score``: the log-probabilities of hypotheses with these scores."""
        ended_NS = ends(ids_NS, token_ids)
        length_N = 1 + jnp.argmax(ended_NS, axis=1)
        return jnp.where(ended_NS.any(axis=1), scores_N / self.score(1.0, length_N), scores_N)

    def hope(self, log_probs: Array, *, length: Array, max_length: int) -> Array:
        """Bounds the score that live hypotheses of ``length`` tokens can still reach."""
        return self.score(log_probs, max_length)


@dataclass(frozen=True, kw_only=True)
class HuggingFaceRule:
    """Scores n tokens, including the end, by log-probability / n ** length_penalty.

    Hypotheses cut off at the maximum length count as finished, and only the K best candidates of a
    step may finish.  A row stops when it has K finished hypotheses and the best live one, scored at
    its current length, is no better than the worst of them.  This is the heuristic of
    ``early_stopping=False``.
    Source: ``GenerationMixin._beam_search`` in transformers 4.57 and 5.
    """

    length_penalty: float = 1.0

    spares_finish: ClassVar[bool] = False
    cut_off_compete: ClassVar[bool] = True

    def score(self, log_probs: Array, length: Array | int) -> Array:
        """Scores hypotheses of ``length`` tokens, the end included."""
        return log_probs / jnp.asarray(length, jnp.float32) ** self.length_penalty

    def hope(self, log_probs: Array, *, length: Array, max_length: int) -> Array:
        """Estimates the score that live hypotheses reach: their score if they ended now."""
        return self.score(log_probs, length)


BeamRule: TypeAlias = T5XRule | HuggingFaceRule


class Beams(NamedTuple):
    """The K best hypotheses of each row, best first.

    Unused slots hold padding and ``UNUSED_SCORE``.
    """

    ids_NKS: Array
    scores_NK: Array


class _Search(NamedTuple):
    position: Array
    live: Beams  # scores are log-probabilities; -inf marks an empty slot
    finished: Beams  # scores follow the rule; -inf marks an empty slot
    open_N: Array  # rows whose finished hypotheses may still change
    cache: Cache


def beam_search(
    step: StepFn,
    cache: Cache,
    *,
    num_rows: int,
    num_beams: int,
    max_length: int,
    rule: BeamRule | None = None,
    token_ids: TokenIds = T5_IDS,
    processors: LogitsProcessors | None = None,
) -> Beams:
    """Searches for the K = ``num_beams`` best-scoring sequences of each row.

    ``cache`` has ``num_rows`` rows.  The search repeats it, so the step function gets N*K rows;
    those of one example are adjacent.  Every leaf with rows is reordered in each step to follow its
    hypothesis.  Arrays that the hypotheses of a row share, such as cross-attention keys, therefore
    belong in the step function's closure.  At most ``max_length`` tokens are generated, and a row's
    result does not depend on other rows.  ``rule`` defaults to T5X's.  ``processors`` change
    log-probabilities before hypotheses are compared, as in transformers.
    """
    check_max_length(max_length)
    if num_beams < 1:
        raise UserError(f"num_beams is {num_beams}: it must be 1 or more")
    N, K = num_rows, num_beams
    rule = rule or T5XRule()
    processors = None if processors is None else processors.repeated(K)

    def unfinished(search: _Search) -> Array:
        return (search.position < max_length) & jnp.any(search.open_N)

    def extend(search: _Search) -> _Search:
        live, position, length = search.live, search.position, search.position + 1
        last_NK = lax.dynamic_index_in_dim(
            live.ids_NKS, jnp.maximum(position - 1, 0), axis=2, keepdims=False
        )
        tokens_NK = jnp.where(position == 0, token_ids.start, last_NK)
        logits, cache = step(tokens_NK.reshape(N * K), position, search.cache)
        log_probs_NC, parents_NC, tokens_NC = _best_extensions(
            logits, live, position, token_ids, processors
        )
        ids_NCS = lax.dynamic_update_index_in_dim(
            _pick(live.ids_NKS, parents_NC), tokens_NC, position, axis=2
        )
        ended_NC = ends(tokens_NC, token_ids)

        finishes_NC = ended_NC | (length == max_length) if rule.cut_off_compete else ended_NC
        if not rule.spares_finish:
            finishes_NC &= jnp.arange(finishes_NC.shape[1]) < K
        finishes_NC &= search.open_N[:, None]
        scores_NC = jnp.where(finishes_NC, rule.score(log_probs_NC, length), -jnp.inf)
        # Hypotheses that finished earlier come first, so they win ties.
        finished = _best(
            jnp.concatenate([search.finished.ids_NKS, ids_NCS], axis=1),
            jnp.concatenate([search.finished.scores_NK, scores_NC], axis=1),
            K,
        )

        live_scores_NK, chosen_NK = lax.top_k(jnp.where(ended_NC, -jnp.inf, log_probs_NC), K)
        if K > 1:
            cache = _reorder(cache, jnp.take_along_axis(parents_NC, chosen_NK, axis=1))
        hope_N = rule.hope(live_scores_NK[:, 0], length=length, max_length=max_length)
        return _Search(
            position=length,
            live=Beams(_pick(ids_NCS, chosen_NK), live_scores_NK),
            finished=finished,
            open_N=search.open_N & (hope_N > finished.scores_NK[:, -1]),
            cache=cache,
        )

    nothing = Beams(
        jnp.full((N, K, max_length), token_ids.pad, jnp.int32), jnp.full((N, K), -jnp.inf)
    )
    start = _Search(
        position=jnp.int32(0),
        live=Beams(nothing.ids_NKS, nothing.scores_NK.at[:, 0].set(0.0)),
        finished=nothing,
        open_N=jnp.ones((N,), bool),
        cache=_map_rows(lambda leaf: jnp.repeat(leaf, K, axis=0), cache, num_rows=N),
    )
    end = lax.while_loop(unfinished, extend, start)
    ids_NKS, scores_NK = end.finished
    if not rule.cut_off_compete:
        some_finished_N1 = jnp.isfinite(scores_NK[:, :1])
        ids_NKS = jnp.where(some_finished_N1[..., None], ids_NKS, end.live.ids_NKS)
        scores_NK = jnp.where(some_finished_N1, scores_NK, end.live.scores_NK)
    used_NK = jnp.isfinite(scores_NK)
    return Beams(
        jnp.where(used_NK[..., None], ids_NKS, token_ids.pad),
        jnp.where(used_NK, scores_NK, UNUSED_SCORE),
    )


def _best_extensions(
    logits: Array,
    live: Beams,
    position: Array,
    token_ids: TokenIds,
    processors: LogitsProcessors | None,
) -> tuple[Array, Array, Array]:
    """Returns the C best one-token extensions of each row's hypotheses, best first.

    C is 2K for one end-of-sequence id, and K more for each other: at most K extensions end with
    each id, so at least K stay live.  A hypothesis contributes at most C of them, so neither
    log_softmax nor a ranking of K*V numbers is needed.  Returns log-probabilities, parent
    hypotheses and tokens, each [N, C].
    """
    N, K = live.scores_NK.shape
    number = (1 + len(token_ids.all_eos)) * K
    logits_NKV = logits.astype(jnp.float32).reshape(N, K, -1)
    offset_NK = live.scores_NK - jax.nn.logsumexp(logits_NKV, axis=-1)
    if processors is not None:
        log_probs_MV = jax.nn.log_softmax(logits_NKV, axis=-1).reshape(N * K, -1)
        ids_MS = live.ids_NKS.reshape(N * K, -1)
        processed_MV = processors(log_probs_MV, ids_MS, position, token_ids=token_ids)
        logits_NKV, offset_NK = processed_MV.reshape(N, K, -1), live.scores_NK
    top_NKJ, tokens_NKJ = lax.top_k(logits_NKV, min(number, logits_NKV.shape[-1]))
    log_probs_NC, flat_NC = lax.top_k((top_NKJ + offset_NK[..., None]).reshape(N, -1), number)
    tokens_NC = jnp.take_along_axis(tokens_NKJ.reshape(N, -1), flat_NC, axis=1)
    return log_probs_NC, flat_NC // top_NKJ.shape[-1], tokens_NC


def _best(ids_NCS: Array, scores_NC: Array, K: int) -> Beams:
    scores_NK, chosen_NK = lax.top_k(scores_NC, K)
    return Beams(_pick(ids_NCS, chosen_NK), scores_NK)


def _pick(values: Array, chosen_NK: Array) -> Array:
    """Takes entries along axis 1 of each row.

    The batched gather stays local if axis 0 is sharded.
    """

    def of_row(row: Array, chosen_K: Array) -> Array:
        return row[chosen_K]

    picked: Array = jax.vmap(of_row)(values, chosen_NK)
    return picked


def _reorder(cache: Cache, parents_NK: Array) -> Cache:
    N, K = parents_NK.shape

    def follow(leaf: Array) -> Array:
        return _pick(leaf.reshape(N, K, *leaf.shape[1:]), parents_NK).reshape(leaf.shape)

    return _map_rows(follow, cache, num_rows=N * K)


def _map_rows(change: Callable[[Array], Array], cache: Cache, *, num_rows: int) -> Cache:
    """Applies ``change`` to the leaves that have rows, and leaves scalars unchanged."""

    def on_leaf(path: Any, leaf: Array) -> Array:
        if jnp.ndim(leaf) == 0:
            return leaf
        if leaf.shape[0] != num_rows:
            name = jax.tree_util.keystr(path)
            raise ValueError(f"cache leaf {name} has shape {leaf.shape}: expected {num_rows} rows")
        return change(leaf)

    return jax.tree_util.tree_map_with_path(on_leaf, cache)
