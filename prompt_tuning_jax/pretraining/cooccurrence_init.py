"""Token embeddings to start pre-training from: which tokens stand near each other in a corpus."""

import numpy as np
import scipy.sparse

from prompt_tuning_jax.errors import UserError

_PAIRS_PER_CHUNK = 2_000_000
_SAMPLES = 64  # stretches of text, spread over the corpus
_POWER_ITERATIONS = 4
_OVERSAMPLING = 16


def cooccurrence_embeddings(
    tokens: np.ndarray,
    *,
    vocab_size: int,
    embed_dim: int,
    window: int = 5,
    max_tokens: int = 20_000_000,
    seed: int = 0,
) -> np.ndarray:
    """Token embeddings [V, D], float32: factors of positive pointwise mutual information.

    Two tokens at a distance d of at most ``window`` count 1/d; the rows are U * sqrt(S) of the
    truncated singular value decomposition (Levy, Goldberg and Dagan 2015), centred and scaled to
    unit variance overall, as T5's embeddings start.  Tokens that ``tokens`` does not hold get
    normal random rows.  ``tokens`` is flat; of more than ``max_tokens`` a sample spread over them
    is taken.  UserError for a token beyond the vocabulary or more dimensions than it has tokens.
    """
    if not 0 < embed_dim <= vocab_size:
        raise UserError(f"embed_dim must be 1 to vocab_size {vocab_size}, not {embed_dim}")
    if window < 1:
        raise UserError(f"window must be 1 or more, not {window}")
    sample = _sample(tokens, max_tokens=max_tokens)
    if len(sample) and int(sample.max()) >= vocab_size:
        raise UserError(
            f"the corpus has token {int(sample.max())}, beyond vocab_size {vocab_size}; "
            f"was it made with another vocabulary?"
        )
    rng = np.random.default_rng(seed)
    embeddings_VD = rng.standard_normal((vocab_size, embed_dim), dtype=np.float32)
    counts = _count_pairs(sample, vocab_size=vocab_size, window=window)
    seen = np.flatnonzero(counts.sum(axis=1) > 0)
    if len(seen) < 2:
        return embeddings_VD
    information = _positive_pmi(counts[seen][:, seen])
    rows = _factorize(information, rank=min(embed_dim, len(seen)), rng=rng)
    # The mean points at frequency; in a model it would be one bias that all tokens share.
    rows -= rows.mean(axis=0)
    embeddings_VD[seen, : rows.shape[1]] = rows / rows.std()
    return embeddings_VD


def _sample(tokens: np.ndarray, *, max_tokens: int) -> np.ndarray:
    if len(tokens) <= max_tokens:
        return np.asarray(tokens)
    length = max_tokens // _SAMPLES
    starts = np.linspace(0, len(tokens) - length, _SAMPLES).astype(np.int64)
    return np.concatenate([tokens[start : start + length] for start in starts])


def _count_pairs(tokens: np.ndarray, *, vocab_size: int, window: int) -> scipy.sparse.csr_matrix:
    """Symmetric counts [V, V]; pairs over the ends of documents are too few to matter."""
    counts = scipy.sparse.csr_matrix((vocab_size, vocab_size), dtype=np.float32)
    for start in range(0, len(tokens), _PAIRS_PER_CHUNK):
        chunk = tokens[start : start + _PAIRS_PER_CHUNK + window].astype(np.int32)
        for distance in range(1, window + 1):
            left = chunk[:_PAIRS_PER_CHUNK][: max(len(chunk) - distance, 0)]
            right = chunk[distance : distance + len(left)]
            weight = np.full(len(left), 1 / distance, np.float32)
            pairs = scipy.sparse.coo_matrix((weight, (left, right)), shape=counts.shape)
            counts += pairs.tocsr()
    return (counts + counts.T).tocsr()


def _positive_pmi(counts: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
    """max(0, log(p(a, b) / (p(a) p(b)))) where a and b were seen together."""
    total = np.asarray(counts.sum(axis=1), np.float64).ravel()
    pairs = counts.tocoo()
    expected = total[pairs.row] * total[pairs.col] / total.sum()
    values = np.maximum(np.log(pairs.data / expected), 0).astype(np.float32)
    information = scipy.sparse.csr_matrix((values, (pairs.row, pairs.col)), shape=counts.shape)
    information.eliminate_zeros()
    return information


def _factorize(
    matrix: scipy.sparse.csr_matrix, *, rank: int, rng: np.random.Generator
) -> np.ndarray:
    """U * sqrt(S) [rows, rank] by a randomised range finder (Halko, Martinsson and Tropp 2011)."""
    size = matrix.shape[0]
    width = min(rank + _OVERSAMPLING, size)
    # A small matrix is full enough that a dense product, on all cores, is the faster one.
    factor = matrix.toarray() if size <= 16_000 else matrix
    basis = rng.standard_normal((size, width), dtype=np.float32)
    for _ in range(_POWER_ITERATIONS):
        basis, _ = np.linalg.qr(factor @ basis)
        basis, _ = np.linalg.qr(factor.T @ basis)
    basis, _ = np.linalg.qr(factor @ basis)
    left, singular, _ = np.linalg.svd((factor.T @ basis).T, full_matrices=False)
    return np.asarray((basis @ left[:, :rank]) * np.sqrt(singular[:rank]), np.float32)
