"""Properties of batches formed from length buckets, for sets and batches of many sizes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prompt_tuning_jax.data.batching.buckets import WINDOW, BucketPlan, Buckets
from prompt_tuning_jax.data.batching.example_cache import make_ragged
from prompt_tuning_jax.data.batching.loader import (
    TrainBatches,
    eval_batches,
    eval_padding,
    eval_plan,
)
from prompt_tuning_jax.data.batching.tokenize import TokenizedExamples
from prompt_tuning_jax.data.tasks.task import Source, Task

TASK = Task(
    name="mine",
    source=Source(splits=("train",), rows=lambda s, d: [], fingerprint=lambda s, d: ""),
)
ROOT = Path(__file__).resolve().parents[2]
LIMIT = 96
AUTO = Buckets(most=4)
GIVEN = Buckets(lengths=(16, 24, 64))
# (examples, B): whole batches, remainders, two batches, less than one.
SIZES = [(64, 8), (250, 32), (251, 16), (100, 7), (33, 16), (31, 16), (5, 8), (400, 32), (97, 1)]


def draw_lengths(number, seed=0):
    """Of which a few are above the limit."""
    return np.random.default_rng(seed).gamma(3.0, 12.0, size=number).astype(np.int64) + 2


def make(number, seed=0, first=1000):
    lengths_N = draw_lengths(number, seed)
    return TokenizedExamples(
        task=TASK,
        split="train",
        inputs=make_ragged([[i + first] * (n - 1) + [1] for i, n in enumerate(lengths_N)]),
        targets=make_ragged([[i + first, 1] for i in range(number)]),
        inputs_length=LIMIT,
        targets_length=3,
        load_texts=list,
    )


LENGTHS = st.lists(st.integers(1, 2 * LIMIT), min_size=1, max_size=60)
CHOICES = st.one_of(
    st.builds(Buckets, most=st.integers(0, 9), beside=st.integers(0, 20)),
    st.lists(st.integers(1, LIMIT), min_size=1, max_size=5, unique=True).map(
        lambda lengths: Buckets(lengths=tuple(sorted(lengths)))
    ),
)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, batch_size=st.integers(1, 20), buckets=CHOICES, seed=st.integers(0, 99))
def test_steps_of_a_set_are_its_epochs_and_fit_their_length(lengths, batch_size, buckets, seed):
    size, plan = (
        len(lengths),
        BucketPlan([np.asarray(lengths)], limit=LIMIT, batch_size=batch_size, buckets=buckets),
    )
    steps = range(-(-3 * size // batch_size))
    stream = np.concatenate([plan.indices_for(step, seed) for step in steps])
    for start in range(0, 3 * size, size):
        assert sorted(stream[start : start + size]) == list(range(size))
    for step in reversed(steps):  # in any order
        chosen = plan.indices_for(step, seed)
        np.testing.assert_array_equal(chosen, stream[step * batch_size :][:batch_size])
        longest = max(min(lengths[i], LIMIT) for i in chosen)
        assert longest <= plan.length_for(step) <= LIMIT


@settings(max_examples=10, deadline=None)
@given(sets=st.lists(LENGTHS, min_size=2, max_size=4), batch_size=st.integers(1, 8), data=st.data())
def test_mixtures_draw_by_rate_and_each_set_in_epochs(sets, batch_size, data):
    rate = st.floats(0.1, 10)
    rates = data.draw(st.lists(rate, min_size=len(sets), max_size=len(sets)), label="rates")
    plan = BucketPlan(
        [np.asarray(each) for each in sets],
        limit=LIMIT,
        batch_size=batch_size,
        buckets=AUTO,
        rates=rates,
    )
    stream = np.concatenate([plan.indices_for(step, 0) for step in range(WINDOW)])
    first = np.cumsum([0, *map(len, sets)])
    of_set = np.searchsorted(first, stream, side="right") - 1
    for number, size in enumerate(map(len, sets)):
        drawn = np.bincount(stream[of_set == number] - first[number], minlength=size)
        share = len(stream) * rates[number] / sum(rates)
        assert abs(drawn.sum() - share) < len(sets)
        assert drawn.max() - drawn.min() <= 1  # all examples of a set equally often


def plan_of(number, batch_size, buckets=AUTO):
    return BucketPlan([draw_lengths(number)], limit=LIMIT, batch_size=batch_size, buckets=buckets)


@pytest.mark.parametrize("buckets", [AUTO, GIVEN, Buckets(most=9)])
@pytest.mark.parametrize(("number", "batch_size"), SIZES)
def test_every_epoch_holds_every_example_once(number, batch_size, buckets):
    plan = plan_of(number, batch_size, buckets)
    steps = -(-5 * number // batch_size)
    stream = np.concatenate([plan.indices_for(step, 3) for step in range(steps)])
    for epoch in range(5):
        part = stream[epoch * number : (epoch + 1) * number]
        np.testing.assert_array_equal(np.sort(part), np.arange(number))


@pytest.mark.parametrize("buckets", [AUTO, GIVEN, Buckets(most=9)])
@pytest.mark.parametrize(("number", "batch_size"), SIZES)
def test_all_rows_of_a_batch_are_from_its_bucket(number, batch_size, buckets):
    plan = plan_of(number, batch_size, buckets)
    capped_N = np.minimum(draw_lengths(number), LIMIT)
    # The bucket of an example is the same in all epochs and for all seeds.
    bucket_of_example = {}
    for seed in (0, 9):
        for step in range(-(-4 * number // batch_size)):
            length = plan.length_for(step)
            indices_B = plan.indices_for(step, seed)
            assert indices_B.shape == (batch_size,) and length in plan.lengths
            assert capped_N[indices_B].max() <= length
            for index in indices_B.tolist():
                assert bucket_of_example.setdefault(index, length) == length
    assert len(plan.lengths) <= max(buckets.most, len(buckets.lengths) + 1)
    # Longer inputs are never in shorter buckets.
    in_bucket_N = np.array([bucket_of_example[i] for i in range(number)])
    order = np.argsort(capped_N, kind="stable")
    assert (np.diff(in_bucket_N[order]) >= 0).all()


@pytest.mark.parametrize(("number", "batch_size"), [(250, 32), (400, 8), (1000, 16)])
def test_most_padding_is_gone(number, batch_size):
    examples = make(number)
    steps = 10 * number // batch_size
    fixed = TrainBatches(examples, batch_size=batch_size, seeds=0)
    auto = TrainBatches(examples, batch_size=batch_size, seeds=0, buckets=AUTO)
    assert fixed.padding(0, steps) > 55
    assert auto.padding(0, steps) < 27
    # It is what the arrays hold.
    tokens = [auto[step]["inputs"] for step in range(steps)]
    padding = sum((t == 0).sum() for t in tokens) / sum(t.size for t in tokens)
    assert auto.padding(0, steps) == pytest.approx(100 * padding)


def test_lengths_do_not_depend_on_the_seed_nor_batches_on_neighbors():
    examples = make(250)
    alone = {s: TrainBatches(examples, batch_size=16, seeds=s, buckets=AUTO) for s in (0, 7)}
    together = TrainBatches(examples, batch_size=16, seeds=(7, 3, 0), buckets=AUTO)
    shapes = set()
    for step in (*range(40), 10**7):
        batch = together[step]
        for member, seed in ((0, 7), (2, 0)):
            for name, array in alone[seed][step].items():
                np.testing.assert_array_equal(array, batch[name][member])
        shapes.add(batch["inputs"].shape)
    assert 1 < len(shapes) <= 4
    assert len({tuple(together.indices_for(0, seed)) for seed in (0, 3, 7)}) == 3


def test_a_step_can_be_asked_for_without_those_before():
    plan = plan_of(100, 7)
    want = [(plan.length_for(s), plan.indices_for(s, 5).tolist()) for s in range(60)]
    for step in np.random.default_rng(0).permutation(60):
        again = plan_of(100, 7)
        assert (again.length_for(step), again.indices_for(step, 5).tolist()) == want[step]


def test_processes_of_a_run_share_the_plan_and_the_batch():
    examples = [make(100), make(60, seed=1, first=3000)]
    fields = {"batch_size": 8, "seeds": (1, 2), "rates": (2, 1), "buckets": AUTO}
    whole = TrainBatches(examples, **fields)
    parts = [TrainBatches(examples, rows=slice(4 * p, 4 * p + 4), **fields) for p in (0, 1)]
    for step in (0, 5, 200):
        assert len({b.lengths_for(step) for b in (whole, *parts)}) == 1
        for name, array in whole[step].items():
            np.testing.assert_array_equal(
                np.concatenate([part[step][name] for part in parts], axis=1), array
            )
    assert parts[0].padding(0, 9) == whole.padding(0, 9)


def test_another_process_has_the_same_plan():
    code = (
        "import json\n"
        "from tests.data.test_bucket_plan import plan_of\n"
        "plan = plan_of(100, 7)\n"
        "print(json.dumps([[plan.length_for(s), plan.indices_for(s, 5).tolist()]"
        " for s in (0, 13, 999)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    plan = plan_of(100, 7)
    assert json.loads(done.stdout) == [
        [plan.length_for(s), plan.indices_for(s, 5).tolist()] for s in (0, 13, 999)
    ]


def test_the_order_never_changes_between_versions():
    """A run that is resumed after an upgrade sees what it would have seen."""
    plan = BucketPlan([np.arange(12) * 8 + 1], limit=96, batch_size=3, buckets=GIVEN)
    assert [plan.length_for(step) for step in range(8)] == LENGTHS_OF_STEPS
    assert [plan.indices_for(step, 0).tolist() for step in range(4)] == ORDER_OF_SEED_0


LENGTHS_OF_STEPS = [96, 24, 64, 96, 64, 96, 24, 96]
ORDER_OF_SEED_0 = [[7, 8, 9], [0, 2, 1], [3, 4, 5], [6, 11, 10]]


def test_epochs_seeds_and_batches_differ_in_order():
    plan = plan_of(256, 8)
    epochs = {
        tuple(np.concatenate([plan.indices_for(32 * epoch + s, seed) for s in range(32)]))
        for seed in range(3)
        for epoch in range(4)
    }
    assert len(epochs) == 12
    lengths = {tuple(plan.length_for(32 * e + s) for s in range(32)) for e in range(4)}
    assert len(lengths) == 4 and all(list(each) != sorted(each) for each in lengths)
    # Rows meet other rows of their bucket in each epoch.
    batches = [
        {frozenset(plan.indices_for(32 * e + s, 0).tolist()) for s in range(32)} for e in range(2)
    ]
    assert len(batches[0] & batches[1]) == 0


def test_every_example_is_as_likely_early_as_late():
    """Where in an epoch an example comes, over many epochs: no length is favored."""
    number, batch_size, epochs = 128, 8, 400
    plan = plan_of(number, batch_size)
    per_epoch = number // batch_size
    where = np.zeros((epochs, number))
    for epoch in range(epochs):
        for s in range(per_epoch):
            where[epoch, plan.indices_for(epoch * per_epoch + s, 0)] = s
    middle, error = (per_epoch - 1) / 2, np.sqrt((per_epoch**2 - 1) / 12 / epochs)
    assert np.abs(where.mean(axis=0) - middle).max() < 5 * error
    by_length = np.argsort(draw_lengths(number))
    assert np.abs(where.mean(axis=0)[by_length[:32]].mean() - middle) < 5 * error


def mixture(rates, batch_size=8, sizes=(90, 13, 200)):
    sets = [draw_lengths(n, seed) for seed, n in enumerate(sizes)]
    return BucketPlan(sets, limit=LIMIT, batch_size=batch_size, buckets=AUTO, rates=rates)


@pytest.mark.parametrize("rates", [(), (3.0, 1.0, 0.5), (1.0, 1e-5, 70.0)])
def test_mixtures_keep_their_rates_and_every_set_its_epochs(rates):
    sizes = (90, 13, 200)
    plan = mixture(rates)
    share = np.asarray(rates or (1, 1, 1)) / sum(rates or (1, 1, 1))
    first = np.cumsum([0, *sizes])
    capped_N = np.minimum(np.concatenate([draw_lengths(n, s) for s, n in enumerate(sizes)]), LIMIT)
    counts_N = np.zeros(first[-1], np.int64)
    for window in range(4):
        for step in range(window * WINDOW, (window + 1) * WINDOW):
            indices_B = plan.indices_for(step, 2)
            assert capped_N[indices_B].max() <= plan.length_for(step)
            np.add.at(counts_N, indices_B, 1)
        rows = (window + 1) * WINDOW * 8
        for number in range(3):
            own = counts_N[first[number] : first[number + 1]]
            assert abs(own.sum() - rows * share[number]) <= 3
            assert own.max() - own.min() <= 1  # each example once, then each once more
    assert 1 < len(plan.lengths) <= 4


def test_mixtures_batches_have_one_length_for_all_seeds_and_few_longer_than_needed():
    plan = mixture((2.0, 1.0, 3.0))
    capped_N = np.minimum(
        np.concatenate([draw_lengths(n, s) for s, n in enumerate((90, 13, 200))]), LIMIT
    )
    before = dict(zip(plan.lengths, (0, *plan.lengths), strict=False))
    promoted = 0
    for step in range(WINDOW):
        length = plan.length_for(step)
        for seed in (0, 5):
            promoted += (capped_N[plan.indices_for(step, seed)] <= before[length]).sum()
    assert promoted <= 2 * 8 * (len(plan.lengths) - 1)


def test_far_shares_are_exact():
    plan = mixture((0.3, 0.2, 0.1))
    for rows in (0, 1, 10**6, 10**12):
        one, next_one = plan._shares(rows), plan._shares(rows + 1)
        assert one.sum() == rows and next_one.sum() == rows + 1 and (next_one >= one).all()


@pytest.mark.parametrize("buckets", [AUTO, GIVEN])
@pytest.mark.parametrize("number", [1, 7, 8, 9, 16, 61])
def test_evaluation_sees_every_example_once(number, buckets):
    examples = make(number)
    found = {}
    widths = []
    for batch in eval_batches(examples, batch_size=8, buckets=buckets):
        assert {len(array) for array in batch.values()} == {8}
        mask, index_B = batch["row_mask"], batch["example_index"]
        rows = mask.sum()
        assert rows > 0 and mask[:rows].all() and (index_B[rows:] == -1).all()
        assert not batch["targets"][rows:].any()
        inputs_BT = batch["inputs"]
        assert (inputs_BT[:, 0] > 0).all()
        widths.append(inputs_BT.shape[1])
        for index, row in zip(index_B[mask].tolist(), inputs_BT, strict=False):
            assert index not in found
            found[index] = row[row > 0]
    assert sorted(found) == list(range(number)) and len(set(widths)) <= 4
    for index, row in found.items():
        length = min(len(examples.inputs[index]), LIMIT)
        np.testing.assert_array_equal(row, examples.inputs.padded(np.array([index]), length)[0])
    plan = eval_plan(examples, batch_size=8, buckets=buckets)
    assert [length for _, length in plan] == widths
    real = sum(map(len, found.values()))
    assert eval_padding(plan, examples) == pytest.approx(100 * (1 - real / (8 * sum(widths))))


def test_evaluation_pays_for_buckets_only():
    examples = make(600)
    fixed, auto = (eval_plan(examples, batch_size=64, buckets=b) for b in (Buckets(), AUTO))
    assert eval_padding(fixed, examples) > 55 and eval_padding(auto, examples) < 31
    assert (np.concatenate([index for index, _ in fixed])[:600] == np.arange(600)).all()
