"""Weight initializations: mimetic attention, and embeddings from co-occurrence counts."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import scipy.sparse

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.t5.attention import Attention
from prompt_tuning_jax.models.t5.model import T5

# Mimetic attention: the scale of its scores, and how much of each value it adds.
SHARPNESS = 0.25
CARRIED = 0.3
CARRIED_ACROSS = 1.0
# Matching attention: the score of a perfect match, and how much of each value it adds.
MATCHED = 16.0
CARRIED_BY_MATCH = 4.0


def start_attention(model: T5, *, matching: bool, seed: int = 0) -> None:
    """Initializes every attention layer to attend to similar positions and copy their values.

    Trockman & Kolter 2023 observed that in trained models the product of the query and key maps,
    and that of the value and output maps, are close to multiples of the identity.  Here both
    products are exact multiples, with one random rotation per layer.  Cross attention therefore
    carries words from the encoder to the output layer from the first step; with the usual
    initialization this takes thousands of steps.

    With ``matching``, the first half of the encoder's layers compare each position with the other
    positions shifted circularly by half the model's width, because ``methods.DescribedPrompts``
    shifts the words of a class in that way.  Each position of a text then takes on the labels of
    the classes that it resembles.  Without training, this picks the right one of two classes from a
    word in the text in three of four cases; mimetic attention alone is at chance.

    Raises UserError unless num_heads * head_dim = embed_dim.
    """
    config = model.config
    if config.num_heads * config.head_dim != config.embed_dim:
        raise UserError(
            "model.attention_init=mimetic and matching need num_heads * head_dim = embed_dim"
        )
    random = np.random.default_rng(seed)
    encoder = [model.encoder.layer(i).attention for i in range(config.num_encoder_layers)]
    layers = [model.decoder.layer(i) for i in range(config.num_decoder_layers)]
    cross = [layer.encoder_decoder_attention for layer in layers]
    matched = encoder[: (len(encoder) + 1) // 2] if matching else []
    for attention in (*encoder, *(layer.self_attention for layer in layers), *cross):
        rotation_DJ = _rotation(random, config.embed_dim)
        if attention in matched:
            sharpness = (MATCHED / config.head_dim) ** 0.5
            label_DJ = _rotation(random, config.embed_dim)
            turned_DJ = np.roll(rotation_DJ, -(config.embed_dim // 2), axis=0)
            carried = CARRIED_BY_MATCH**0.5
            kernels = {
                "query": turned_DJ * sharpness,
                "key": rotation_DJ * sharpness,
                "value": label_DJ * carried,
                "out": label_DJ.T * carried,
            }
        else:
            # A normalized position scores 64 * sharpness**2 with itself in each head of width 64.
            sharpness = SHARPNESS * (64 / config.head_dim) ** 0.5
            carried = (CARRIED_ACROSS if attention in cross else CARRIED) ** 0.5
            kernels = {
                "query": rotation_DJ * sharpness,
                "key": rotation_DJ * sharpness,
                "value": rotation_DJ * carried,
                "out": rotation_DJ.T * carried,
            }
        _set(attention, kernels)


def _rotation(random: np.random.Generator, width: int) -> np.ndarray:
    return np.linalg.qr(random.normal(size=(width, width)))[0]


def _set(attention: Attention, kernels: Mapping[str, np.ndarray]) -> None:
    for name, value in kernels.items():
        kernel = getattr(attention, name).kernel
        kernel.set_value(jnp.asarray(value, kernel.get_value().dtype))


_PAIRS_PER_CHUNK = 2_000_000
_SAMPLES = 64  # stretches of text, evenly spaced over the corpus


def cooccurrence_embeddings(
    tokens: np.ndarray,
    *,
    vocab_size: int,
    embed_dim: int,
    window: int = 5,
    max_tokens: int = 20_000_000,
    seed: int = 0,
) -> np.ndarray:
    """Returns token embeddings [V, D], float32, by factoring positive pointwise mutual information.

    Two tokens at a distance d of at most ``window`` count 1/d.  The rows are U * sqrt(S) of the
    truncated singular value decomposition (Levy, Goldberg and Dagan 2015), centered and scaled to
    unit overall variance, like T5's initial embeddings.  Tokens that do not occur in ``tokens`` get
    normally distributed random rows.

    ``tokens`` is a flat array.  If it is longer than ``max_tokens``, an evenly spaced sample is
    used.  Raises UserError if a token is outside the vocabulary, ``embed_dim`` exceeds
    ``vocab_size``, or ``window`` is less than 1.
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
    rows = _factorize(information, rank=min(embed_dim, len(seen)), seed=seed)
    # The mean encodes frequency; a model would see it as one bias shared by all tokens.
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
    """Returns symmetric counts [V, V], including the few pairs that cross document boundaries."""
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
    """Returns max(0, log(p(a, b) / (p(a) p(b)))) for the pairs that occur together."""
    total = np.asarray(counts.sum(axis=1), np.float64).ravel()
    pairs = counts.tocoo()
    expected = total[pairs.row] * total[pairs.col] / total.sum()
    values = np.maximum(np.log(pairs.data / expected), 0).astype(np.float32)
    information = scipy.sparse.csr_matrix((values, (pairs.row, pairs.col)), shape=counts.shape)
    information.eliminate_zeros()
    return information


def _factorize(matrix: scipy.sparse.csr_matrix, *, rank: int, seed: int) -> np.ndarray:
    """Returns U * sqrt(S) [rows, rank] by randomized SVD (Halko, Martinsson and Tropp 2011)."""
    from sklearn.utils.extmath import randomized_svd

    # Small matrices have few zeros, so dense products on all cores are faster.
    factor = matrix.toarray() if matrix.shape[0] <= 16_000 else matrix
    left, singular, _ = randomized_svd(
        factor,
        rank,
        n_oversamples=16,
        n_iter=4,
        power_iteration_normalizer="QR",
        random_state=seed,
    )
    return np.asarray(left * np.sqrt(singular), np.float32)
