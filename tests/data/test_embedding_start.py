import numpy as np
import pytest

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.pretraining import initializations
from prompt_tuning_jax.pretraining.initializations import cooccurrence_embeddings

CLASSES, MEMBERS = 12, 6  # the token t is a member of class t % 12; tokens 72 to 99 do not occur
VOCAB_SIZE = 100


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    """Classes follow each other by a sparse rule, their members are drawn at random."""
    rng = np.random.default_rng(1)
    successors = np.array([rng.choice(CLASSES, 2, replace=False) for _ in range(CLASSES)])
    classes = [0]
    for choice in rng.integers(2, size=60_000):
        classes.append(successors[classes[-1], choice])
    members = rng.integers(MEMBERS, size=len(classes))
    return (np.array(classes) + CLASSES * members).astype(np.uint16)


def embed(tokens: np.ndarray, **kwargs) -> np.ndarray:
    return cooccurrence_embeddings(tokens, **{"vocab_size": VOCAB_SIZE, "embed_dim": 16, **kwargs})


def test_tokens_of_the_same_contexts_are_near(tokens):
    rows = embed(tokens)
    present = np.unique(tokens)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for token in present:
        others = present[present != token]
        near = others[np.argsort(-unit[others] @ unit[token])][: MEMBERS - 1]
        assert set(near % CLASSES) == {token % CLASSES}


def test_scale_is_standard_and_unseen_rows_are_normal(tokens):
    rows = embed(tokens, vocab_size=2000)
    present = np.unique(tokens)
    unseen = np.delete(rows, present, axis=0)
    assert rows.dtype == np.float32
    assert rows.shape == (2000, 16)
    assert abs(rows[present].std() - 1) < 1e-3
    assert np.abs(rows[present].mean(axis=0)).max() < 1e-3
    assert abs(unseen.std() - 1) < 0.02
    assert np.abs(np.corrcoef(unseen.T) - np.eye(16)).max() < 0.1


def test_depends_on_the_seed_alone(tokens):
    np.testing.assert_array_equal(embed(tokens, seed=3), embed(tokens, seed=3))
    # The seed moves the rows of unseen tokens; what is known of the others stays.
    one, two = embed(tokens, seed=3), embed(tokens, seed=4)
    assert (one[80] != two[80]).all()
    present = np.unique(tokens)
    gram_one, gram_two = one[present] @ one[present].T, two[present] @ two[present].T
    assert np.corrcoef(gram_one.ravel(), gram_two.ravel())[0, 1] > 0.99


def test_counts_are_those_of_a_plain_loop(monkeypatch):
    rng = np.random.default_rng(0)
    tokens = rng.integers(9, size=50).astype(np.uint16)
    expected = np.zeros((9, 9))
    for i in range(50):
        for distance in (1, 2, 3):
            if i + distance < 50:
                expected[tokens[i], tokens[i + distance]] += 1 / distance
                expected[tokens[i + distance], tokens[i]] += 1 / distance
    for chunk in (1000, 50, 49, 7, 1):
        monkeypatch.setattr(initializations, "_PAIRS_PER_CHUNK", chunk)
        counts = initializations._count_pairs(tokens, vocab_size=9, window=3).toarray()
        np.testing.assert_allclose(counts, expected, rtol=1e-5)


def test_information_is_positive_pmi():
    from scipy.sparse import csr_matrix

    # p(0,1) = 2/6 against (2/6)(3/6) expected; p(1,2) = 1/6 against (3/6)(1/6), the same ratio.
    counts = csr_matrix(np.array([[0, 2, 0], [2, 0, 1], [0, 1, 0]], np.float32))
    information = initializations._positive_pmi(counts).toarray()
    expected = np.log(2) * np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]])
    np.testing.assert_allclose(information, expected, rtol=1e-5)
    independent = csr_matrix(np.array([[4, 2], [2, 1]], np.float32))
    assert np.abs(initializations._positive_pmi(independent).toarray()).max() < 1e-6


def test_factors_are_those_of_the_exact_decomposition():
    from scipy.sparse import csr_matrix

    rng = np.random.default_rng(0)
    matrix = rng.random((40, 40)) * 0.9 ** np.arange(40)
    matrix = (matrix + matrix.T).astype(np.float32)
    left, singular, _ = np.linalg.svd(matrix)
    expected = left[:, :5] * np.sqrt(singular[:5])
    rows = initializations._factorize(csr_matrix(matrix), rank=5, seed=0)
    np.testing.assert_allclose(rows @ rows.T, expected @ expected.T, atol=1e-2)


def test_a_sample_is_spread_over_the_corpus():
    tokens = np.repeat(np.arange(100, dtype=np.uint16), 1000)
    sample = initializations._sample(tokens, max_tokens=6400)
    assert len(sample) == 6400
    assert sample[0] == 0
    assert sample[-1] == 99
    assert len(np.unique(sample)) >= 60
    assert initializations._sample(tokens, max_tokens=len(tokens)) is not None


def test_degenerate_corpora(tokens):
    for few in (np.zeros(0, np.uint16), np.array([5], np.uint16)):
        assert abs(embed(few).std() - 1) < 0.1
    rows = embed(np.array([1, 2, 3] * 50, np.uint16))  # fewer tokens than dimensions
    assert np.isfinite(rows).all()
    with pytest.raises(UserError, match="token 71, beyond vocab_size 71"):
        embed(tokens, vocab_size=71)
    with pytest.raises(UserError, match="embed_dim"):
        embed(tokens, embed_dim=101)
    with pytest.raises(UserError, match="window"):
        embed(tokens, window=0)
