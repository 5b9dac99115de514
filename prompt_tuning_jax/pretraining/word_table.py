"""Corpus statistics of vocabulary pieces: which are words, how common and how similar they are."""

from dataclasses import dataclass

import numpy as np

from prompt_tuning_jax.data.vocabularies.vocab import AnyVocabulary
from prompt_tuning_jax.errors import UserError

_RANKED_OUT = 120  # number of most common pieces to exclude: articles, pronouns, punctuation
_SMOOTHING = 1e-3
_COMPARED_DIMS = 96
_NEIGHBORS = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class WordTable:
    """Statistics of the V pieces of a vocabulary, C of which are single-piece content words.

    ``vectors_VD`` are unit embeddings times ``weights_V``, which are small for common pieces
    (smooth inverse frequency, Arora et al. 2017).  The vector of a text is the sum over its pieces,
    minus ``mean_D`` times the sum of their weights.
    """

    starts_word_V: np.ndarray  # bool
    is_content_V: np.ndarray  # bool
    content_C: np.ndarray  # ids
    content_shares_C: np.ndarray  # cumulative shares of frequency**0.75
    neighbors_CM: np.ndarray  # ids of the most similar content words, itself first
    vectors_VD: np.ndarray
    weights_V: np.ndarray
    mean_D: np.ndarray

    def draw_content(self, uniform: np.ndarray) -> np.ndarray:
        """Maps uniform draws in [0, 1) to content words, as positions in C, of the same shape.

        Common words are more likely.
        """
        return np.searchsorted(self.content_shares_C, uniform, side="right").clip(
            max=len(self.content_C) - 1
        )

    def vectors(self, tokens: np.ndarray) -> np.ndarray:
        """Returns unit vectors [..., D] of texts ``[..., L]`` of token ids; -1 is padding."""
        known = tokens >= 0
        ids = np.where(known, tokens, 0)
        weights = np.where(known, self.weights_V[ids], 0)
        summed = np.einsum("...l,...ld->...d", known.astype(np.float32), self.vectors_VD[ids])
        summed -= weights.sum(-1)[..., None] * self.mean_D
        return summed / (np.linalg.norm(summed, axis=-1, keepdims=True) + 1e-6)


def make_word_table(
    tokens: np.ndarray, vocabulary: AnyVocabulary, embeddings_VD: np.ndarray
) -> WordTable:
    """Returns the table of a corpus, given its flat ``tokens`` and embeddings made from them.

    The embeddings may be ``cooccurrence_embeddings``, for example.  A content word is a piece of
    three or more lowercase letters that begins a word and is not among the most common pieces.
    Raises UserError if the vocabulary has too few content words; a byte vocabulary has none.
    """
    size = len(embeddings_VD)
    counts_V = np.bincount(np.asarray(tokens).ravel(), minlength=size)[:size].astype(np.float64)
    shares_V = counts_V / max(counts_V.sum(), 1)
    pieces = [vocabulary.pieces(i) for i in range(min(size, vocabulary.size))]
    starts_V = np.zeros(size, bool)
    starts_V[: len(pieces)] = [piece.startswith("▁") for piece in pieces]
    is_word_V = np.zeros(size, bool)
    is_word_V[: len(pieces)] = [
        piece.startswith("▁") and len(piece) > 3 and piece[1:].isalpha() and piece[1:].islower()
        for piece in pieces
    ]
    common = np.argsort(-counts_V, kind="stable")[:_RANKED_OUT]
    is_content_V = is_word_V & (shares_V > 1e-6)
    is_content_V[common] = False
    content_C = np.flatnonzero(is_content_V)
    if len(content_C) < 2 * _NEIGHBORS:
        raise UserError(
            f"label objectives need words that are one piece each; this vocabulary and text have "
            f"{len(content_C)}: use a SentencePiece vocabulary and more text"
        )
    vectors_VD = embeddings_VD[:, :_COMPARED_DIMS].astype(np.float32)
    vectors_VD = vectors_VD / (np.linalg.norm(vectors_VD, axis=1, keepdims=True) + 1e-6)
    weights_V = (_SMOOTHING / (_SMOOTHING + shares_V)).astype(np.float32)
    used_V = (shares_V * weights_V)[:, None]
    mean_D = (used_V * vectors_VD).sum(0) / used_V.sum()
    similarity_CC = vectors_VD[content_C] @ vectors_VD[content_C].T
    nearest_CM = np.argsort(-similarity_CC, axis=1, kind="stable")[:, :_NEIGHBORS]
    powered_C = counts_V[content_C] ** 0.75
    return WordTable(
        starts_word_V=starts_V,
        is_content_V=is_content_V,
        content_C=content_C,
        content_shares_C=np.cumsum(powered_C) / powered_C.sum(),
        neighbors_CM=content_C[nearest_CM],
        vectors_VD=vectors_VD * weights_V[:, None],
        weights_V=weights_V,
        mean_D=mean_D.astype(np.float32),
    )
