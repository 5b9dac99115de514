"""The lengths that are chosen against all that could have been."""

import itertools

import numpy as np
import pytest

from prompt_tuning_jax.data.batching.buckets import FIXED, Buckets, bucket_of
from prompt_tuning_jax.errors import UserError


def positions(lengths_N, chosen, beside=0):
    return (np.asarray(chosen)[bucket_of(lengths_N, chosen)] + beside).sum()


@pytest.mark.parametrize("beside", [0, 20])
@pytest.mark.parametrize("seed", range(8))
def test_no_other_lengths_of_that_number_have_less_padding(seed, beside):
    rng = np.random.default_rng(seed)
    lengths_N = rng.integers(1, rng.integers(20, 90), size=60)
    limit = 72
    top = min(limit, max(16, -(-int(lengths_N.max()) // 8) * 8))
    chosen = Buckets(most=3, beside=beside).choose(lengths_N, limit=limit)
    assert chosen[-1] == top and len(chosen) <= 3 and list(chosen) == sorted(set(chosen))
    capped = np.minimum(lengths_N, limit)
    best = {
        number: min(
            positions(capped, (*others, top), beside)
            for others in itertools.combinations(range(16, top, 8), number - 1)
        )
        for number in range(1, min(3, len(range(16, top, 8)) + 1) + 1)
    }
    assert positions(capped, chosen, beside) == best[len(chosen)]
    # One more is worth it, or was not.
    assert best[len(chosen)] <= 1.03 * min(best.values())
    assert all(best[number] > 1.03 * min(best.values()) for number in range(1, len(chosen)))


def test_rows_weigh_what_they_say():
    lengths_N = np.array([20, 20, 90, 40])
    again_N = np.repeat(lengths_N, [5, 1, 2, 9])
    buckets = Buckets(most=2)
    weighted = buckets.choose(lengths_N, np.array([5, 1, 2, 9]), limit=200)
    assert weighted == buckets.choose(again_N, limit=200) == (40, 96)


def test_automatic_lengths_stay_within_the_limit_and_few():
    assert Buckets(most=4).choose(np.array([3, 5, 9]), limit=14) == (14,)
    assert Buckets(most=4).choose(np.array([3, 5, 9]), limit=512) == (16,)
    lengths_N = np.arange(1, 1000)
    for most in range(1, 9):
        chosen = Buckets(most=most).choose(lengths_N, limit=511)
        assert len(chosen) <= most and chosen[-1] == 511
        assert all(length % 8 == 0 for length in chosen[:-1])
    # A prompt that outweighs the inputs leaves nothing to gain.
    assert len(Buckets(most=4, beside=100_000).choose(lengths_N, limit=511)) == 1


def test_given_lengths_are_taken_and_the_limit_is_added_where_needed():
    given = Buckets.from_text("64,128")
    assert given.choose(np.array([10, 100]), limit=512) == (64, 128)
    assert given.choose(np.array([10, 60]), limit=512) == (64,)
    assert given.choose(np.array([10, 300]), limit=512) == (64, 128, 512)
    assert given.choose(np.array([10, 900]), limit=128) == (64, 128)
    assert FIXED.choose(np.array([10]), limit=512) == (512,)


def test_bucket_of_is_the_first_that_holds_a_length():
    np.testing.assert_array_equal(
        bucket_of(np.array([1, 16, 17, 40, 41, 99]), (16, 40)), [0, 0, 1, 1, 1, 1]
    )


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("none", FIXED),
        ("auto", Buckets(most=4, beside=7)),
        (" auto:6 ", Buckets(most=6, beside=7)),
        ("64", Buckets(lengths=(64,), beside=7)),
        ("64, 128,256", Buckets(lengths=(64, 128, 256), beside=7)),
    ],
)
def test_texts(text, want):
    assert Buckets.from_text(text, beside=7) == want


@pytest.mark.parametrize(
    "text", ["", "four", "auto:", "auto:0", "auto:x", "64,64", "128,64", "0,8", "8,", "none:2"]
)
def test_bad_texts(text):
    with pytest.raises(UserError, match=r"data\.buckets is") as error:
        Buckets.from_text(text)
    assert "\n" not in str(error.value)
