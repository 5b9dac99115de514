"""Similarity of prompts, and their mixture."""

import numpy as np
import pytest

from prompt_tuning_jax.analysis.similarity import BY, By, mixture, similarity
from prompt_tuning_jax.errors import UserError
from tests.micro import normal


@pytest.mark.parametrize("by", BY)
def test_symmetric_and_without_a_scale(by: By) -> None:
    a, b = normal(5, 16), normal(3, 16, seed=1)
    assert similarity(a, b, by=by) == pytest.approx(similarity(b, a, by=by), abs=1e-12)
    assert similarity(2 * a, b, by=by) == pytest.approx(similarity(a, b, by=by), abs=1e-12)
    assert similarity(-a, b, by=by) == pytest.approx(-similarity(a, b, by=by), abs=1e-12)
    assert similarity(a[::-1], b, by=by) == pytest.approx(similarity(a, b, by=by), abs=1e-12)
    assert similarity(0 * a, b, by=by) == 0


def test_the_two_of_the_paper() -> None:
    """Of the mean 1 with itself; of all pairs what a loop over them gives."""
    a, b = normal(5, 16), normal(3, 16, seed=1)
    assert similarity(a, a) == pytest.approx(1, abs=1e-12)
    assert similarity(a[:1], a[:1], by="tokens") == pytest.approx(1, abs=1e-12)
    cosines = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x in a for y in b]
    assert similarity(a, b, by="tokens") == pytest.approx(np.mean(cosines), abs=1e-6)
    mean_a, mean_b = a.mean(0), b.mean(0)
    cosine = mean_a @ mean_b / np.linalg.norm(mean_a) / np.linalg.norm(mean_b)
    assert similarity(a, b, by="mean") == pytest.approx(cosine, abs=1e-6)
    # Long positions count as much as short ones in pairs, and more in the mean.
    longer = a * np.array([10, 1, 1, 1, 1])[:, None]
    assert similarity(longer, b, by="tokens") == pytest.approx(similarity(a, b, by="tokens"))
    assert similarity(longer, b) != pytest.approx(similarity(a, b), abs=1e-3)


def test_mixtures() -> None:
    a, b = normal(5, 16), normal(5, 16, seed=1)
    mixed = mixture([a, b], [0.9, 0.3])
    np.testing.assert_allclose(mixed, 0.75 * a + 0.25 * b, atol=1e-6)
    assert mixed.dtype == np.float32
    np.testing.assert_array_equal(mixture([a], [0.2]), a)
    with pytest.raises(UserError, match="one shape"):
        mixture([a, b[:4]], [1, 1])
    with pytest.raises(UserError, match="not above 0"):
        mixture([a, b], [1, -0.1])
    with pytest.raises(UserError, match="no width in common"):
        similarity(a, b[:, :8])
