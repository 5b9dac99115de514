"""The words nearest to the positions of a prompt (Lester et al. 2021, section 7)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax.data.vocabularies.base import BaseVocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.typing import Array, HostArray

Distance = Literal["cosine", "euclidean"]
DISTANCES: tuple[Distance, ...] = get_args(Distance)
Cluster = Literal["lexical", "related", ""]
# Words are forms of one word if they share this many first letters.
_STEM = 4
_MOST_FORMS = 3  # of the nearest words, for a lexical cluster
# The tightness of this share of random directions is below that of a cluster.
_CHANCE = 95
_RANDOM_DIRECTIONS = 200
_BLANK = "▁"


def nearest_tokens(
    vectors_PD: Array, table_VD: Array, *, number: int, by: Distance = "cosine"
) -> tuple[Array, Array]:
    """Returns the ids ``[P, number]`` of the embeddings nearest to each vector, nearest first.

    The second result are their cosines, or their Euclidean distances.  Runs under ``jax.jit``.
    """
    vectors_PD, table_VD = vectors_PD.astype(jnp.float32), table_VD.astype(jnp.float32)
    if by == "cosine":
        cosines_PK, ids_PK = jax.lax.top_k(_unit(vectors_PD) @ _unit(table_VD).T, number)
        return ids_PK, cosines_PK
    squares_P = jnp.square(vectors_PD).sum(axis=-1)
    squares_V = jnp.square(table_VD).sum(axis=-1)
    negated_PV = 2 * vectors_PD @ table_VD.T - squares_P[:, None] - squares_V
    negated_PK, ids_PK = jax.lax.top_k(negated_PV, number)
    return ids_PK, jnp.sqrt(jnp.maximum(-negated_PK, 0.0))


def token_text(vocabulary: BaseVocabulary, token: int) -> str:
    """Returns what a reader sees of a token: its text, its piece if it has none, or its number."""
    known = vocabulary.pieces(token) if token < vocabulary.size else ""
    return vocabulary.decode([token]) or known or f"<{token}>"


def embedding_rows(model: Model, vocabulary: BaseVocabulary) -> Array:
    """Returns the embeddings ``[V, D]`` of the vocabulary's tokens in the space of prompts.

    Models may have more rows, which belong to no token.
    """
    number = min(vocabulary.size, model.config.vocab_size)
    rows_VD: Array = model.embedding_table()[jnp.arange(number)]
    return rows_VD.astype(jnp.float32)


@dataclass(frozen=True, kw_only=True)
class NearestWords:
    """The nearest words of the positions of a prompt.

    Attributes:
      words: for each position, the nearest words and their cosines or distances.
      tightness_P: mean cosine between the embeddings of a position's nearest words.
      chance: the tightness that 95 % of random directions do not reach.
      clusters: for each position, ``lexical`` if its words are closer to each other than chance
        and mostly forms of one word, ``related`` if they are only closer, and otherwise empty.
    """

    words: tuple[tuple[tuple[str, float], ...], ...]
    tightness_P: HostArray
    chance: float
    clusters: tuple[Cluster, ...]


def nearest_words(
    prompt_PD: Array | HostArray,
    table_VD: Array,
    vocabulary: BaseVocabulary,
    *,
    number: int = 5,
    by: Distance = "cosine",
) -> NearestWords:
    """Finds the ``number`` nearest words of each position, and how closely they are related.

    A position's nearest words resemble each other because they are near the same vector, so they
    count as a cluster only if they do so more than those of random directions.  Raises UserError
    for fewer than two words, or more than there are.
    """
    if not 2 <= number <= table_VD.shape[0]:
        raise UserError(
            f"--top {number}: give a number of words from 2 to {table_VD.shape[0]:,}, the size of "
            "the vocabulary"
        )
    prompt = jnp.asarray(prompt_PD, jnp.float32)
    ids_PK, values_PK = (np.asarray(x) for x in _nearest(prompt, table_VD, number=number, by=by))
    tightness_P = _tightness(ids_PK, table_VD)
    random_RD = np.random.default_rng(0).normal(size=(_RANDOM_DIRECTIONS, table_VD.shape[1]))
    random_RD *= np.linalg.norm(prompt, axis=1).mean() / np.linalg.norm(random_RD, axis=1).mean()
    random_ids_RK, _ = _nearest(jnp.asarray(random_RD, jnp.float32), table_VD, number=number, by=by)
    chance = float(np.percentile(_tightness(np.asarray(random_ids_RK), table_VD), _CHANCE))
    words = tuple(
        tuple(
            (token_text(vocabulary, int(token)), float(value))
            for token, value in zip(ids_K, values_K, strict=True)
        )
        for ids_K, values_K in zip(ids_PK, values_PK, strict=True)
    )
    clusters = tuple(
        _cluster([word for word, _ in row], float(tightness), chance)
        for row, tightness in zip(words, tightness_P, strict=True)
    )
    return NearestWords(words=words, tightness_P=tightness_P, chance=chance, clusters=clusters)


def ranks_of(prompt_PD: HostArray, start_PD: HostArray, table_VD: Array) -> list[int]:
    """Returns the rank of each position's start among the neighbors of the trained position.

    The rank is 1 plus the number of tokens whose cosine with the trained position is larger than
    that of its start, so a position that kept its word has rank 1.  Tokens with the very direction
    of the start do not count.
    """
    cosines_PV = np.asarray(_unit(jnp.asarray(prompt_PD, jnp.float32)) @ _unit(table_VD).T)
    own_P = np.sum(_unit(jnp.asarray(prompt_PD)) * _unit(jnp.asarray(start_PD)), axis=-1)
    # Rounding must not put a start behind itself.
    return [int(rank) for rank in 1 + (cosines_PV > np.asarray(own_P)[:, None] + 1e-5).sum(axis=1)]


_nearest = jax.jit(nearest_tokens, static_argnames=("number", "by"))


def _tightness(ids_PK: HostArray, table_VD: Array) -> HostArray:
    units_PKD = np.asarray(_unit(table_VD[jnp.asarray(ids_PK)]), np.float64)
    cosines_PKK = units_PKD @ units_PKD.swapaxes(1, 2)
    number = ids_PK.shape[1]
    total_P: HostArray = cosines_PKK.sum(axis=(1, 2)) - np.trace(cosines_PKK, axis1=1, axis2=2)
    return total_P / (number * (number - 1))


def _cluster(words: Sequence[str], tightness: float, chance: float) -> Cluster:
    if tightness <= chance:
        return ""
    stems = [word.strip().casefold().replace(_BLANK, "")[:_STEM] for word in words]
    most = max(stems.count(stem) for stem in stems)
    return "lexical" if most >= min(_MOST_FORMS, len(words)) else "related"


def _unit(vectors_XD: Array) -> Array:
    """Scales vectors to unit length; zero vectors stay zero."""
    norms_X = jnp.linalg.norm(vectors_XD, axis=-1, keepdims=True)
    return vectors_XD / jnp.where(norms_X == 0, 1, norms_X)
