"""Label scoring against log-probabilities added up one token at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.decoding import rank, sequence_log_probs

LABELS = [(1,), (2, 1), (3, 1), (3, 3, 1), (4, 2, 1), (2, 2, 4)]


def pad(labels):
    return np.array([[*label, *[0] * (3 - len(label))] for label in labels], np.int32)


def decoder(toy, *, start=0):
    """All positions at once, as teacher forcing does: label_S -> logits_BSV that predict it."""

    def label_logits(label_S):
        input_S = jnp.concatenate([jnp.full((1,), start, jnp.int32), label_S[:-1]])
        before_S = jnp.concatenate([jnp.zeros((1,), jnp.int32), input_S[:-1]])
        table = jnp.asarray(toy.log_probs)
        return table[:, jnp.arange(len(input_S)), before_S, input_S] - 4.0

    return label_logits


def run(toy, labels, **kwargs):
    return jax.jit(lambda labels_CS: rank(decoder(toy), labels_CS, **kwargs))(pad(labels))


def test_agrees_with_a_plain_sum(make_toy):
    toy = make_toy(1, num_rows=4)
    scores_BC = run(toy, LABELS)
    expected = [[toy.log_prob(row, label) for label in LABELS] for row in range(4)]
    assert scores_BC.shape == (4, len(LABELS)) and scores_BC.dtype == jnp.float32
    np.testing.assert_allclose(scores_BC, expected, atol=1e-5)


def test_all_sequences_together_have_probability_one(make_toy):
    toy = make_toy(2, padding=-50.0)
    sequences = [ids for ids in toy.sequences() if 0 not in ids]
    scores_BC = run(toy, sequences)
    np.testing.assert_allclose(jnp.exp(scores_BC).sum(axis=1), 1.0, atol=1e-5)


def test_length_normalisation_divides_by_the_tokens(make_toy):
    toy = make_toy(3)
    summed = run(toy, LABELS)
    mean = run(toy, LABELS, normalize_length=True)
    np.testing.assert_allclose(mean * np.array([len(label) for label in LABELS]), summed, rtol=1e-5)
    assert (mean.argmax(axis=1) != summed.argmax(axis=1)).any()


def test_some_labels_at_a_time_equal_all_at_once(make_toy):
    toy = make_toy(4, num_rows=5)
    together = run(toy, LABELS)
    for at_once in (1, 4):  # 6 labels: one by one, and four with two left over
        chunked = run(toy, LABELS, max_logits=at_once * 5 * 3 * 5)
        np.testing.assert_allclose(chunked, together, rtol=1e-6)


def test_what_the_labels_share_is_computed_once(make_toy):
    """The closure is traced for a label alone, and what it closes over gets no label axis."""
    keys_BUD = jnp.ones((4, 7, 3))
    shapes = []

    def label_logits(input_S):
        shapes.append(input_S.shape)
        mixed_BD = keys_BUD.mean(axis=1)
        return jnp.broadcast_to(mixed_BD[:, None, :], (4, 3, 3)) * input_S[None, :, None]

    jaxpr = jax.make_jaxpr(lambda labels: rank(label_logits, labels))(pad(LABELS) % 3)
    assert set(shapes) == {(3,)} and len(shapes) <= 2
    means = [e for e in jaxpr.jaxpr.eqns if any(v.aval.shape == (4, 7, 3) for v in e.invars)]
    assert [e.outvars[0].aval.shape for e in means] == [(4, 3)]


def test_it_gives_whole_labels_and_leaves_the_start_to_the_model(make_toy):
    toy, seen = make_toy(5), set()

    def label_logits(label_S):
        jax.debug.callback(lambda tokens: seen.add(tuple(tokens.tolist())), label_S)
        return decoder(toy, start=3)(label_S)

    first = rank(label_logits, pad([(2, 1), (4, 2, 1)]))
    jax.effects_barrier()
    assert seen == {(2, 1, 0), (4, 2, 1)}
    expected = toy.log_probs[:, 0, 0, 3, 2] + toy.log_probs[:, 1, 3, 2, 1]
    np.testing.assert_allclose(first[:, 0], expected, atol=1e-5)


def test_the_padding_is_the_one_that_is_told(make_toy):
    """Where it is not 0, a label may hold a 0."""
    toy = make_toy(6)
    labels = np.array([[2, 0, 1], [3, 1, -1]], np.int32)
    expected = [[toy.log_prob(row, label) for label in [(2, 0, 1), (3, 1)]] for row in range(3)]
    np.testing.assert_allclose(rank(decoder(toy), labels, padding=-1), expected, atol=1e-5)
    with pytest.raises(UserError, match="label number 0 has no tokens"):
        rank(decoder(toy), np.full((1, 3), -1, np.int32), padding=-1)


def test_a_label_without_tokens_is_refused(make_toy):
    with pytest.raises(UserError, match="label number 1 has no tokens"):
        rank(decoder(make_toy()), np.array([[2, 1, 0], [0, 0, 0]], np.int32))


def test_sequence_log_probs_is_log_softmax_at_real_targets():
    rng = np.random.default_rng(0)
    logits_BSV = jnp.asarray(rng.normal(size=(4, 6, 9)) * 5, jnp.float32)
    targets_BS = rng.integers(1, 9, size=(4, 6))
    targets_BS[1, 3:] = 0
    at_target = np.take_along_axis(
        np.asarray(jax.nn.log_softmax(logits_BSV)), targets_BS[..., None], axis=-1
    )[..., 0]
    expected = np.where(targets_BS != 0, at_target, 0).sum(axis=1)
    got = sequence_log_probs(logits_BSV, jnp.asarray(targets_BS))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    # What stands at padding has no say, not even as NaN.
    spoilt = logits_BSV.at[1, 3:].set(jnp.nan)
    np.testing.assert_array_equal(sequence_log_probs(spoilt, jnp.asarray(targets_BS)), got)


def test_low_precision_logits_are_summed_in_float32():
    logits_BSV = jnp.zeros((1, 400, 7), jnp.bfloat16)
    got = sequence_log_probs(logits_BSV, jnp.ones((1, 400), jnp.int32))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, -400 * np.log(7), rtol=1e-5)


def test_score_is_differentiable(make_toy):
    logits_BSV = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5)), jnp.float32)
    targets_BS = jnp.array([[2, 1, 0], [3, 4, 1]])
    grad = jax.grad(lambda x: sequence_log_probs(x, targets_BS).sum())(logits_BSV)
    expected = (jax.nn.one_hot(targets_BS, 5) - jax.nn.softmax(logits_BSV)) * (targets_BS != 0)[
        ..., None
    ]
    np.testing.assert_allclose(grad, expected, atol=1e-6)
