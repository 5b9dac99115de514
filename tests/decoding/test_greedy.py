"""Greedy decoding against a plain loop over a toy model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.decoding import greedy
from prompt_tuning_jax.models.config import TokenIds

EOS = 1


def run(toy, **kwargs):
    kwargs = {"num_rows": toy.num_rows, "max_length": toy.max_length, **kwargs}
    return jax.jit(lambda cache: greedy(toy.step, cache, **kwargs))(toy.cache())


def by_hand(toy, example, start_id=0):
    ids = ()
    while len(ids) < toy.max_length and EOS not in ids:
        ids += (int(np.argmax(toy.next_log_probs(example, ids))),)
    return ids


def test_agrees_with_a_plain_loop(make_toy):
    toy = make_toy(num_rows=40, max_length=6, eos=1.0)
    decoded = run(toy)
    for row in range(toy.num_rows):
        ids = by_hand(toy, row)
        assert int(decoded.lengths_N[row]) == len(ids)
        assert tuple(decoded.ids_NS[row, : len(ids)].tolist()) == ids
        assert not decoded.ids_NS[row, len(ids) :].any()
        assert float(decoded.scores_N[row]) == pytest.approx(toy.log_prob(row, ids), abs=1e-5)
    assert len(set(decoded.lengths_N.tolist())) > 4  # some end before others


def test_stops_when_every_row_has_ended(make_toy):
    toy = make_toy(0, num_rows=4, max_length=50, eos=2.0)
    decoded = run(toy)
    assert toy.steps_taken() == int(decoded.lengths_N.max()) < toy.max_length


def test_without_an_end_writes_max_length_tokens(make_toy):
    toy = make_toy(0, max_length=6, eos=-50.0)
    assert run(toy).lengths_N.tolist() == [6, 6, 6]
    assert toy.steps_taken() == 6


def test_eos_id_is_what_it_is_told(make_toy):
    toy = make_toy(0, num_rows=8, max_length=6)
    decoded = run(toy, token_ids=TokenIds(eos=3))
    ended = (decoded.ids_NS == 3).any(axis=1)
    assert ended.any()
    assert (jnp.argmax(decoded.ids_NS == 3, axis=1) + 1 == decoded.lengths_N)[ended].all()


def test_first_step_gets_the_start_token_and_ended_rows_get_padding():
    seen = []

    def step(tokens_N, position, cache):
        jax.debug.callback(lambda tokens: seen.append(tokens.tolist()), tokens_N)
        # Row 0 ends at once, row 1 writes 2 for ever.
        return jnp.eye(5)[jnp.array([EOS, 2])], cache

    decoded = greedy(step, (), num_rows=2, max_length=3, token_ids=TokenIds(start=4))
    jax.effects_barrier()
    assert seen == [[4, 4], [EOS, 2], [0, 2]]
    assert decoded.ids_NS.tolist() == [[EOS, 0, 0], [2, 2, 2]]


def test_padding_written_by_the_model_is_not_an_end():
    def step(tokens_N, position, cache):
        return jnp.eye(5)[jnp.where(position < 2, 0, EOS)][None], cache

    decoded = greedy(step, (), num_rows=1, max_length=5)
    assert decoded.ids_NS.tolist() == [[0, 0, EOS, 0, 0]]
    assert decoded.lengths_N.tolist() == [3]


def test_low_precision_logits_are_summed_in_float32():
    logits_NV = jnp.array([[0.1, 0.3, 2.0, 0.7, -1.0]], jnp.bfloat16)
    decoded = greedy(lambda t, p, c: (logits_NV, c), (), num_rows=1, max_length=300)
    each = float(jax.nn.log_softmax(logits_NV.astype(jnp.float32))[0, 2])
    assert decoded.scores_N.dtype == jnp.float32
    assert float(decoded.scores_N[0]) == pytest.approx(300 * each, rel=1e-4)


def test_max_length_below_one_is_refused(make_toy):
    with pytest.raises(UserError, match="max_length is 0"):
        run(make_toy(), max_length=0)
