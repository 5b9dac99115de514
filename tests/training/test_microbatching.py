"""Microbatches and chunks of members are as large as fit, and change no result."""

import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax.inference.ensemble import map_members
from prompt_tuning_jax.models.t5.config import PRESETS
from prompt_tuning_jax.training.step import NO_MICROBATCHING, Microbatching

SMALL = Microbatching(config=PRESETS["small"], prompt_positions=100)


def test_parts_are_the_fewest_that_fit():
    assert SMALL.microbatches(16, 128) == 4
    assert SMALL.microbatches(15, 128) == 5  # it must divide
    assert Microbatching(config=PRESETS["small"]).microbatches(16, 34) == 1
    assert SMALL.microbatches(16, 10_000) == 16  # a row is the least
    assert Microbatching(config=PRESETS["xxl"]).microbatches(1, 612) == 1
    assert Microbatching(config=PRESETS["base"]).microbatches(32, 228) > SMALL.microbatches(32, 128)


def test_a_prompt_that_is_read_once_per_part_has_many_positions_behind_it():
    config = PRESETS["small"]
    alone = Microbatching(config=config, shared_positions=2)
    assert alone.microbatches(16, 128) == Microbatching(config=config).microbatches(16, 128)
    parts = Microbatching(config=config, shared_positions=100).microbatches(16, 128)
    assert parts == 2 < SMALL.microbatches(16, 128)  # 1,024 positions behind 100
    assert Microbatching(config=config, shared_positions=1000).microbatches(16, 128) == 1


def test_members_are_together_as_long_as_they_fit_and_parts_do_not_depend_on_them():
    tiny = Microbatching(config=PRESETS["tiny"], prompt_positions=20)
    assert tiny.chunk_size(5, 4, 16) == 5
    assert SMALL.chunk_size(5, 16, 128) == 1
    several = [tiny.chunk_size(6, rows, 30) for rows in (1, 16, 32, 64, 512)]
    assert several == sorted(several, reverse=True) and len(set(several)) > 2
    assert all(6 % number == 0 for number in several)


def test_without_a_question_of_size_all_is_at_once():
    assert (NO_MICROBATCHING.microbatches(7, 9), NO_MICROBATCHING.chunk_size(5, 7, 9)) == (1, 5)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 6])
def test_groups_of_members_give_what_all_together_do(chunk_size):
    x_EN, y_E = jnp.arange(24.0).reshape(6, 4), jnp.arange(6.0)
    got = map_members(lambda x, y: (x * y, x.sum()), x_EN, y_E, members=6, chunk_size=chunk_size)
    np.testing.assert_array_equal(got[0], x_EN * y_E[:, None])
    np.testing.assert_array_equal(got[1], x_EN.sum(1))
