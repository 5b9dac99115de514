"""Cross entropy and z-loss against float64, and what padding is worth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax.models.losses import token_sums
from tests.micro import normal

# Rows: full, padded, one token, nothing but padding.
TARGETS = np.array([[3, 1, 4, 2], [5, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
LOGITS = normal(4, 4, 6, scale=3)


def by_hand(logits, z_loss):
    wide = logits.astype(np.float64)
    log_z = np.log(np.exp(wide).sum(axis=-1))
    total = 0.0
    for b, s in zip(*np.nonzero(TARGETS), strict=True):
        total += log_z[b, s] - wide[b, s, TARGETS[b, s]] + z_loss * log_z[b, s] ** 2
    return total


@pytest.mark.parametrize("z_loss", [0.0, 1e-4, 0.5])
def test_sums_by_hand(z_loss):
    sums = token_sums(jnp.asarray(LOGITS), TARGETS, z_loss=z_loss)
    assert float(sums.loss) == pytest.approx(by_hand(LOGITS, z_loss), rel=1e-6)
    assert float(sums.tokens) == 7 and float(sums.examples) == 3
    assert sums.loss.dtype == sums.tokens.dtype == jnp.float32


def test_z_loss_is_zero_for_normalised_logits_and_grows_with_their_shift():
    normalized = jax.nn.log_softmax(jnp.asarray(LOGITS))
    plain = token_sums(normalized, TARGETS).loss
    assert float(token_sums(normalized, TARGETS, z_loss=1.0).loss) == pytest.approx(float(plain))
    shifted = token_sums(normalized + 2, TARGETS, z_loss=0.25).loss
    assert float(shifted) == pytest.approx(float(plain) + 7 * 0.25 * 4, rel=1e-5)


def test_padding_has_no_part_in_value_or_gradient():
    noisy = np.where((TARGETS == 0)[..., None], 50 * normal(4, 4, 6, seed=2), LOGITS)
    for field in ("loss", "tokens", "examples", "correct"):
        values = [getattr(token_sums(jnp.asarray(x), TARGETS), field) for x in (LOGITS, noisy)]
        assert float(values[0]) == float(values[1])
    gradient = jax.grad(lambda x: token_sums(x, TARGETS, z_loss=0.1).loss)(jnp.asarray(LOGITS))
    assert not gradient[TARGETS == 0].any()
    assert (gradient[TARGETS != 0] != 0).all()


def test_an_example_is_right_when_all_its_real_tokens_are():
    logits = np.full((4, 4, 6), -5.0, np.float32)
    for b, s in np.ndindex(4, 4):
        logits[b, s, TARGETS[b, s] or 5] = 5  # at padding: wrong, and without effect
    assert float(token_sums(jnp.asarray(logits), TARGETS).correct) == 3
    logits[0, 2] = 0  # one of four tokens wrong
    assert float(token_sums(jnp.asarray(logits), TARGETS).correct) == 2
    logits[2, 0, 4] = 9
    assert float(token_sums(jnp.asarray(logits), TARGETS).correct) == 1


def test_low_precision_logits_are_summed_in_float32():
    low = jnp.asarray(np.tile(LOGITS, (100, 1, 1)), jnp.bfloat16)
    targets = np.tile(TARGETS, (100, 1))
    sums = token_sums(low, targets)
    assert sums.loss.dtype == jnp.float32
    want = 100 * by_hand(np.asarray(low[:4], np.float32), 0.0)
    assert float(sums.loss) == pytest.approx(want, rel=1e-5)
    assert float(sums.tokens) == 700


def test_huge_logits_stay_finite():
    sums = token_sums(jnp.asarray(LOGITS) * 1e4, TARGETS)
    assert np.isfinite(float(sums.loss))


def test_weights_multiply_losses_and_tokens_of_their_example() -> None:
    """A weight of two is the example twice, and of zero is no example."""
    weights = np.arange(len(TARGETS)) % 3
    sums = token_sums(jnp.asarray(LOGITS), TARGETS, z_loss=0.1, weights_B=weights)
    often = np.repeat(np.arange(len(TARGETS)), weights)
    want = token_sums(jnp.asarray(LOGITS)[often], TARGETS[often], z_loss=0.1)
    assert float(sums.loss) == pytest.approx(float(want.loss), rel=1e-5)
    assert float(sums.tokens) == float(want.tokens)
    plain = token_sums(jnp.asarray(LOGITS), TARGETS, z_loss=0.1)
    assert float(sums.correct) == float(plain.correct)
    assert float(sums.examples) == float(plain.examples)
