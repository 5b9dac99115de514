"""Minimum length, repetition penalty and repeated n-grams against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.decoding import LogitsProcessors, logits_processors
from prompt_tuning_jax.models.config import TokenIds

V, S, IDS = 6, 9, TokenIds(eos=1, start=3)


def by_hand(scores, written, *, min_length, penalty, ngram):
    """One row: the rules of RepetitionPenalty-, NoRepeatNGram- and MinLengthLogitsProcessor."""
    scores = scores.copy()
    history = [IDS.start, *written]
    for token in set(history):
        scores[token] *= penalty if scores[token] < 0 else 1 / penalty
    if ngram and len(history) + 1 >= ngram:
        grams = [tuple(history[i : i + ngram]) for i in range(len(history) - ngram + 1)]
        begun = tuple(history[len(history) + 1 - ngram :])
        for gram in grams:
            if gram[:-1] == begun:
                scores[gram[-1]] = -np.inf
    if len(history) < min_length:
        scores[IDS.eos] = -np.inf
    return scores


@pytest.fixture(scope="module")
def process():
    @jax.jit
    def run(scores, ids, position, processors):
        return processors(scores, ids, position, token_ids=IDS)

    return run


@pytest.mark.parametrize("ngram", [0, 1, 2, 3, 4])
@pytest.mark.parametrize(("penalty", "min_length"), [(1.0, 0), (1.7, 4), (0.5, 9)])
def test_as_plain_loops(process, ngram, penalty, min_length):
    random = np.random.default_rng(ngram)
    ids = random.choice([2, 3, 4], size=(20, S)).astype(np.int32)
    scores = random.normal(size=(20, V)).astype(np.float32)
    made = LogitsProcessors(
        min_length=jnp.int32(min_length),
        repetition_penalty=jnp.float32(penalty),
        no_repeat_ngram_size=jnp.int32(ngram),
    )
    for position in range(S):
        got = process(scores, ids, position, made)
        want = [
            by_hand(row, written[:position], min_length=min_length, penalty=penalty, ngram=ngram)
            for row, written in zip(scores, ids.tolist(), strict=True)
        ]
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_ngrams_longer_than_a_text_repeat_nothing_and_take_no_time(process):
    """The number of a request would otherwise be that of a loop's iterations in each step."""
    scores = np.random.default_rng(0).normal(size=(20, V)).astype(np.float32)
    ids = np.full((20, S), 2, np.int32)
    for ngram in (S + 2, 2**31 - 1):
        made = LogitsProcessors(
            min_length=jnp.int32(0),
            repetition_penalty=jnp.float32(1),
            no_repeat_ngram_size=jnp.int32(ngram),
        )
        np.testing.assert_array_equal(process(scores, ids, S - 1, made), scores)


def test_each_row_may_have_its_own(process):
    random = np.random.default_rng(0)
    ids = random.choice([2, 3], size=(4, S)).astype(np.int32)
    scores = random.normal(size=(4, V)).astype(np.float32)
    shortest, penalties, ngrams = [0, 3, 9, 0], [1.0, 2.0, 1.0, 0.5], [0, 2, 3, 1]
    positions = [0, 2, 8, 5]
    got = process(
        scores,
        ids,
        jnp.asarray(positions),
        LogitsProcessors(
            min_length=jnp.asarray(shortest),
            repetition_penalty=jnp.asarray(penalties),
            no_repeat_ngram_size=jnp.asarray(ngrams),
        ),
    )
    want = [
        by_hand(
            scores[i],
            ids[i, : positions[i]].tolist(),
            min_length=shortest[i],
            penalty=penalties[i],
            ngram=ngrams[i],
        )
        for i in range(4)
    ]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert process._cache_size() == 2  # a number for all, and one for each row; not one per value


def test_none_is_made_where_nothing_is_asked_for():
    assert logits_processors(max_length=4) is None
    assert logits_processors(max_length=4, min_length=4) is not None
    with pytest.raises(UserError, match=r"evaluation\.min_length is 5.*at most 4"):
        logits_processors(max_length=4, min_length=5, prefix="evaluation.")
