"""Beam search against all sequences listed, and against a search over plain lists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.decoding import HuggingFaceRule, T5XRule, beam_search, greedy
from prompt_tuning_jax.inference.decoding.beam import UNUSED_SCORE
from prompt_tuning_jax.models.config import TokenIds

EOS = 1
EVERYTHING = 85  # all sequences of up to 3 tokens, of which 21 end
RULES = [
    T5XRule(alpha=0.6),
    T5XRule(alpha=2.0),
    HuggingFaceRule(length_penalty=0.0),
    HuggingFaceRule(length_penalty=1.0),
]
ONE_EACH = RULES[::3]


def run(toy, num_beams, rule, **kwargs):
    kwargs = {"num_rows": toy.num_rows, "max_length": toy.max_length, **kwargs}
    search = jax.jit(lambda c: beam_search(toy.step, c, num_beams=num_beams, rule=rule, **kwargs))
    ids_NKS, scores_NK = search(toy.cache())
    return np.asarray(ids_NKS), np.asarray(scores_NK)


def score(rule, log_prob, length):
    if isinstance(rule, T5XRule):
        return log_prob / ((5 + length) / 6) ** rule.alpha
    return log_prob / length**rule.length_penalty


def search_lists(toy, example, K, rule):
    """One row's hypotheses as lists of (score, ids), best first; stops as each source does."""
    t5x = isinstance(rule, T5XRule)
    live, finished = [(0.0, ())], []
    for length in range(1, toy.max_length + 1):
        candidates = [
            (log_prob + float(more), (*ids, token))
            for log_prob, ids in live
            for token, more in enumerate(toy.next_log_probs(example, ids))
        ]
        candidates = sorted(candidates, reverse=True)[: 2 * K]
        for place, (log_prob, ids) in enumerate(candidates):
            if (
                ids[-1] == EOS
                if t5x
                else (ids[-1] == EOS or length == toy.max_length) and place < K
            ):
                finished.append((score(rule, log_prob, length), ids))
        finished = sorted(finished, reverse=True)[:K]
        live = [c for c in candidates if c[1][-1] != EOS][:K]
        at = toy.max_length + 1 if t5x else length
        if len(finished) == K and finished[-1][0] >= score(rule, live[0][0], at):
            break
    return finished or live


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_beam_as_wide_as_everything_lists_everything(make_toy, rule):
    toy = make_toy(11)
    ids_NKS, scores_NK = run(toy, EVERYTHING, rule)
    for row in range(toy.num_rows):
        expected = sorted(
            (
                (score(rule, toy.log_prob(row, ids), len(ids)), ids)
                for ids in toy.sequences()
                if isinstance(rule, HuggingFaceRule) or ids[-1] == EOS
            ),
            reverse=True,
        )
        used = len(expected)
        assert used == (21 if isinstance(rule, T5XRule) else EVERYTHING)
        np.testing.assert_allclose(scores_NK[row, :used], [s for s, _ in expected], atol=1e-5)
        for ids_S, (_, ids) in zip(ids_NKS[row], expected, strict=False):
            assert ids_S.tolist() == [*ids, *[0] * (3 - len(ids))]
        assert (scores_NK[row, used:] == UNUSED_SCORE).all()
        assert not ids_NKS[row, used:].any()


@pytest.mark.parametrize(
    "K, rule",
    [(3, rule) for rule in (*RULES, HuggingFaceRule(length_penalty=-1.0))]
    + [(1, rule) for rule in ONE_EACH],
    ids=str,
)
def test_narrow_beams_agree_with_a_search_over_lists(make_toy, K, rule):
    eos = [-1.0] * 15 + [0.5] * 15 + [3.0] * 15
    toy = make_toy(0, num_rows=45, max_length=6, eos=eos)
    ids_NKS, scores_NK = run(toy, K, rule)
    for row in range(toy.num_rows):
        expected = search_lists(toy, row, K, rule)
        for slot, (value, ids) in enumerate(expected):
            assert ids_NKS[row, slot].tolist() == [*ids, *[0] * (6 - len(ids))]
            assert scores_NK[row, slot] == pytest.approx(value, abs=1e-4)
        assert (scores_NK[row, len(expected) :] == UNUSED_SCORE).all()


def test_one_beam_that_never_ends_is_greedy(make_toy):
    toy = make_toy(4, num_rows=8, max_length=6, eos=-50.0)
    greedy_ids = greedy(toy.step, toy.cache(), num_rows=8, max_length=6).ids_NS
    np.testing.assert_array_equal(run(toy, 1, T5XRule())[0][:, 0], greedy_ids)


def test_without_an_end_t5x_returns_raw_log_probabilities_and_hugging_face_scores(make_toy):
    # Two beams: with three the six candidates would be all five tokens, and the end among them.
    toy = make_toy(4, num_rows=2, max_length=6, eos=-50.0)
    live_ids, live = run(toy, 2, T5XRule(alpha=1.0))
    cut_ids, cut = run(toy, 2, HuggingFaceRule(length_penalty=1.0))
    np.testing.assert_array_equal(live_ids, cut_ids)
    np.testing.assert_allclose(live, 6 * cut, rtol=1e-5)


@pytest.mark.parametrize("rule", ONE_EACH, ids=str)
def test_a_row_does_not_depend_on_its_batch(make_toy, rule):
    toy = make_toy(9, num_rows=12, max_length=8, eos=1.0)
    ids_NKS, scores_NK = run(toy, 3, rule)
    search_alone = jax.jit(
        lambda c: beam_search(toy.step, c, num_rows=1, num_beams=3, max_length=8, rule=rule)
    )
    for row in range(12):
        alone = search_alone(toy.cache([row]))
        np.testing.assert_array_equal(alone.ids_NKS[0], ids_NKS[row])
        np.testing.assert_allclose(alone.scores_NK[0], scores_NK[row], rtol=1e-6)


@pytest.mark.parametrize("rule", ONE_EACH, ids=str)
def test_stops_early_once_nothing_can_improve(make_toy, rule):
    toy = make_toy(0, num_rows=3, max_length=60, eos=8.0)
    run(toy, 2, rule)
    assert 2 <= toy.steps_taken() < 10


def test_t5x_stops_only_when_the_result_is_certain(make_toy):
    # A longer maximum can only add hypotheses that score better than those returned.
    toy = make_toy(0, num_rows=30, max_length=12, eos=[0.0] * 15 + [2.0] * 15)
    short_ids, short = run(toy, 2, T5XRule(alpha=1.0), max_length=6)
    long_ids, long = run(toy, 2, T5XRule(alpha=1.0))
    assert (long >= short - 1e-6).all()
    same = (long == short).all(axis=1)
    assert same.any() and not same.all()
    np.testing.assert_array_equal(long_ids[same][..., :6], short_ids[same])


def test_step_gets_the_beams_of_an_example_as_neighbors():
    seen = []

    def step(tokens_N, position, cache):
        jax.debug.callback(lambda rows: seen.append(rows.tolist()), cache["row"])
        return jnp.zeros((len(tokens_N), 5)), cache

    cache = {"row": jnp.array([7, 8])}
    beam_search(step, cache, num_rows=2, num_beams=3, max_length=2, rule=T5XRule())
    jax.effects_barrier()
    assert seen == [[7, 7, 7, 8, 8, 8]] * 2


def test_masked_logits_are_never_written(make_toy):
    toy = make_toy(3, num_rows=4, max_length=4, eos=-3.0)

    def step(tokens_N, position, cache):
        logits_NV, cache = toy.step(tokens_N, position, cache)
        return logits_NV.at[:, jnp.array([2, 4])].set(-jnp.inf), cache

    for rule in ONE_EACH:
        ids_NKS, scores_NK = beam_search(
            step, toy.cache(), num_rows=4, num_beams=6, max_length=4, rule=rule
        )
        assert set(np.unique(ids_NKS).tolist()) <= {0, 1, 3}
        assert np.isfinite(scores_NK).all()


def test_start_and_end_ids_are_what_they_are_told(make_toy):
    toy = make_toy(2, num_rows=4, max_length=6)
    ids_NKS, _ = run(toy, 2, T5XRule(), token_ids=TokenIds(eos=3, start=4))
    assert (ids_NKS == 3).any()
    for ids_S in ids_NKS.reshape(-1, 6):
        ends = np.flatnonzero(ids_S == 3)
        assert len(ends) <= 1 and (not len(ends) or not ids_S[ends[0] + 1 :].any())
    other_start, _ = run(toy, 2, T5XRule(), token_ids=TokenIds(eos=3, start=2))
    assert (ids_NKS != other_start).any()


def test_wrong_settings_are_refused_by_name(make_toy):
    with pytest.raises(UserError, match="num_beams is 0"):
        run(make_toy(), 0, T5XRule())
    with pytest.raises(UserError, match="max_length is 0"):
        run(make_toy(), 2, T5XRule(), max_length=0)
    with pytest.raises(UserError, match="alpha is -1"):
        T5XRule(alpha=-1)


def test_a_cache_leaf_of_another_number_of_rows_is_named(make_toy):
    toy = make_toy()
    cache = {**toy.cache(), "stray": jnp.zeros((7, 2))}
    with pytest.raises(ValueError, match=r"stray.*\(7, 2\).*3 rows"):
        beam_search(toy.step, cache, num_rows=3, num_beams=2, max_length=3)
