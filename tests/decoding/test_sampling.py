"""Sampling: frequencies, support of the cuts, and independence of rows from their batch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.decoding import greedy, sample
from prompt_tuning_jax.inference.decoding.sampling import row_keys

EOS = 1
LOGITS = np.log(np.array([0.05, 0.3, 0.4, 0.15, 0.1], np.float32))
DRAWS = 20_000


@partial(jax.jit, static_argnames=("top_k", "top_p"))
def first_tokens(logits_V, temperature, *, top_k, top_p):
    def step(tokens_N, position, cache):
        return jnp.broadcast_to(logits_V, (DRAWS, len(logits_V))), cache

    return sample(
        step,
        (),
        key=jax.random.key(0),
        num_rows=DRAWS,
        max_length=1,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    ).ids_NS[:, 0]


def draw(logits_V=LOGITS, *, temperature=1.0, top_k=0, top_p=1.0):
    """What many rows that share one distribution write first."""
    return np.asarray(first_tokens(logits_V, temperature, top_k=top_k, top_p=top_p))


def chi_square(drawn, probs):
    expected = probs[probs > 0] * len(drawn)
    observed = np.bincount(drawn, minlength=len(probs))[probs > 0]
    return float(((observed - expected) ** 2 / expected).sum())


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum()


def test_frequencies_follow_the_distribution():
    plain, sharp, flat = draw(temperature=1.0), draw(temperature=0.5), draw(temperature=3.0)
    # Four degrees of freedom: 25 is beyond the 99.99th percentile.
    assert chi_square(plain, softmax(LOGITS)) < 25
    assert chi_square(sharp, softmax(LOGITS / 0.5)) < 25
    assert chi_square(flat, softmax(LOGITS / 3.0)) < 25
    assert chi_square(plain, softmax(LOGITS / 0.5)) > 100


@pytest.mark.parametrize(
    "cuts, support",
    [
        ({"top_k": 3}, [1, 2, 3]),
        ({"top_p": 0.41}, [1, 2]),
        ({"top_p": 0.84}, [1, 2, 3]),
        ({"top_k": 99, "top_p": 0.999}, [0, 1, 2, 3, 4]),
        # Of the three kept, the first has 0.4 / 0.85 = 0.47.
        ({"top_k": 3, "top_p": 0.45}, [2]),
        ({"top_k": 3, "top_p": 0.48}, [1, 2]),
    ],
)
def test_cuts_keep_their_support_in_proportion(cuts, support):
    drawn = draw(**cuts)
    assert sorted(set(drawn.tolist())) == support
    probs = np.zeros(5)
    probs[support] = softmax(LOGITS[support])
    assert chi_square(drawn, probs) < 25


def test_cuts_come_after_the_temperature():
    # At temperature 0.25 the first token alone holds 0.72 of the mass.
    assert set(draw(temperature=0.25, top_p=0.7).tolist()) == {2}


def test_top_k_keeps_k_of_equals():
    assert len(set(draw(np.zeros(5, np.float32), top_k=2).tolist())) == 2


def test_temperature_zero_is_greedy_whatever_the_cuts(make_toy):
    toy = make_toy(3, num_rows=8, max_length=6)
    shape = {"num_rows": toy.num_rows, "max_length": toy.max_length}
    expected = greedy(toy.step, toy.cache(), **shape)
    for cuts in ({}, {"top_k": 3, "top_p": 0.5}):
        sampled = sample(
            toy.step, toy.cache(), key=jax.random.key(0), temperature=0, **cuts, **shape
        )
        jax.tree.map(np.testing.assert_array_equal, sampled, expected)


def test_temperature_may_differ_by_row(make_toy):
    toy = make_toy(3, num_rows=2, max_length=6, eos=-50)
    rows = jnp.array([0] * 50 + [1] * 50)
    sampled = sample(
        toy.step,
        toy.cache(rows),
        key=jax.random.key(0),
        num_rows=100,
        max_length=6,
        temperature=jnp.where(rows == 0, 0.0, 1.0),
    )
    assert len(np.unique(sampled.ids_NS[:50], axis=0)) == 1
    assert len(np.unique(sampled.ids_NS[50:], axis=0)) > 10


def test_scores_are_the_models_log_probabilities(make_toy):
    toy = make_toy(5, num_rows=20, max_length=6, eos=0.5)
    sampled = sample(
        toy.step,
        toy.cache(),
        key=jax.random.key(1),
        num_rows=20,
        max_length=6,
        temperature=2.0,
        top_k=4,
    )
    for row in range(20):
        length = int(sampled.lengths_N[row])
        ids = tuple(sampled.ids_NS[row, :length].tolist())
        assert EOS not in ids[:-1] and (ids[-1] == EOS or length == 6)
        assert not sampled.ids_NS[row, length:].any()
        assert float(sampled.scores_N[row]) == pytest.approx(toy.log_prob(row, ids), abs=1e-5)


def test_a_row_does_not_depend_on_its_batch(make_toy):
    toy = make_toy(7, num_rows=6, max_length=8)
    keys = jax.random.split(jax.random.key(2), 6)

    def run(rows):
        rows = jnp.asarray(rows)
        return sample(
            toy.step, toy.cache(rows), key=keys[rows], num_rows=len(rows), max_length=8, top_p=0.9
        ).ids_NS

    together = run(range(6))
    np.testing.assert_array_equal(run([5, 1, 3]), together[jnp.array([5, 1, 3])])


def test_rows_have_keys_of_their_own_the_same_in_a_larger_batch():
    keys_6 = row_keys(jax.random.key(2), 6)
    assert len(np.unique(jax.random.key_data(keys_6), axis=0)) == 6
    assert (row_keys(jax.random.key(2), 2) == keys_6[:2]).all()


def test_same_key_same_text_and_other_key_other_text(make_toy):
    toy = make_toy(7, num_rows=6, max_length=8, eos=-50)

    @jax.jit
    def run(key):
        return sample(toy.step, toy.cache(), key=key, num_rows=6, max_length=8).ids_NS

    first = run(jax.random.key(0))
    np.testing.assert_array_equal(first, run(jax.random.key(0)))
    np.testing.assert_array_equal(first, run(jax.random.PRNGKey(0)))  # raw keys are keys too
    assert (first != run(jax.random.key(1))).any()
    assert len(np.unique(first, axis=0)) == 6


def test_positions_draw_anew():
    drawn = sample(
        lambda t, p, c: (jnp.zeros((1, 1000)), c),
        (),
        key=jax.random.key(0),
        num_rows=1,
        max_length=20,
    )
    assert len(set(drawn.ids_NS[0].tolist())) > 15


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_wrong_settings_are_refused_by_name(wrong):
    def step(tokens_N, position, cache):
        return jnp.zeros((1, 5)), cache

    with pytest.raises(UserError, match=next(iter(wrong))):
        sample(step, (), key=jax.random.key(0), num_rows=1, max_length=1, **wrong)


def test_keys_must_fit_the_rows(make_toy):
    toy = make_toy()
    with pytest.raises(ValueError, match="expected one key or 3"):
        sample(
            toy.step,
            toy.cache(),
            key=jax.random.split(jax.random.key(0), 2),
            num_rows=3,
            max_length=3,
        )
