"""The majority vote by hand."""

import itertools

import numpy as np
import pytest

from prompt_tuning_jax.inference.ensemble import majority_vote


@pytest.mark.parametrize(
    ("texts", "winner"),
    [("aabbb", "b"), ("abcaba", "a"), ("z", "z"), ("ccabc", "c")],
)
def test_most_votes_win_whatever_the_log_probabilities_say(texts, winner):
    log_probs = [{t: 0.0 if t != winner else -1e9 for t in "abcz"} for _ in texts]
    vote = majority_vote(list(texts), log_probs)
    assert vote.prediction == winner
    assert vote.votes == {t: texts.count(t) for t in texts}


def test_a_tie_goes_to_the_larger_sum_over_all_members_when_ranking():
    # c has no vote and the best sum; a and b tie; the one that did not choose b likes it well.
    log_probs = [{"a": -1.0, "b": -1.1, "c": -0.1}, {"a": -9.0, "b": -0.5, "c": -0.6}]
    assert majority_vote(["a", "b"], log_probs).prediction == "b"
    log_probs = [{"a": -1.0, "b": -9.0, "c": -1.1}, {"a": -0.6, "b": -0.5, "c": -0.6}]
    assert majority_vote(["a", "b"], log_probs).prediction == "a"


def test_when_writing_only_a_texts_own_voters_count():
    texts = ["x", "y", "x", "y", "z"]
    log_probs = [{"x": -1.0}, {"y": -0.4}, {"x": -2.0}, {"y": -2.5}, {"z": 0.0}]
    assert majority_vote(texts, log_probs).prediction == "y"  # -2.9 against -3.0


def test_equal_sums_go_to_the_first_in_the_alphabet():
    log_probs = [{"b": -1.0}, {"a": -1.0}]
    assert majority_vote(["b", "a"], log_probs).prediction == "a"


def test_the_order_of_the_members_is_irrelevant():
    random = np.random.default_rng(0)
    for _ in range(30):
        texts = random.choice(list("abc"), 4).tolist()
        # Tenths: sums that are equal on paper, and in floating point depend on their order.
        log_probs = [
            dict(zip("abc", (-random.integers(1, 5, 3) / 10).tolist(), strict=True)) for _ in texts
        ]
        votes = {
            majority_vote([texts[i] for i in order], [log_probs[i] for i in order]).prediction
            for order in itertools.permutations(range(4))
        }
        assert len(votes) == 1, (texts, log_probs)


def test_by_hand_over_random_votes():
    random = np.random.default_rng(1)
    for _ in range(200):
        texts = random.choice(list("abcd"), 5).tolist()
        table = random.normal(size=(5, 4))
        log_probs = [dict(zip("abcd", row.tolist(), strict=True)) for row in table]
        best = max("abcd", key=lambda t: (texts.count(t), table[:, "abcd".index(t)].sum()))
        assert majority_vote(texts, log_probs).prediction == best
