import threading
import time

import numpy as np
import pytest

from prompt_tuning_jax.data.batching.buckets import Buckets
from prompt_tuning_jax.data.batching.example_cache import make_ragged
from prompt_tuning_jax.data.batching.loader import TrainBatches, eval_batches
from prompt_tuning_jax.data.batching.tokenize import TokenizedExamples
from prompt_tuning_jax.data.tasks.task import Source, Task
from prompt_tuning_jax.errors import UserError

TASK = Task(
    name="mine",
    source=Source(splits=("train",), rows=lambda s, d: [], fingerprint=lambda s, d: ""),
)


def make(number, *, first=10, inputs_length=6, targets_length=3):
    """Example i has the inputs i + first, and so on for a length of its own, and the target i."""
    rows = [[i + first] * (1 + i % 4) + [1] for i in range(number)]
    return TokenizedExamples(
        task=TASK,
        split="train",
        inputs=make_ragged(rows),
        targets=make_ragged([[i + first, 1] for i in range(number)]),
        inputs_length=inputs_length,
        targets_length=targets_length,
        load_texts=lambda: [{"inputs": str(i), "targets": str(i)} for i in range(number)],
    )


def seen(batches, steps, **fields):
    """The first target token, which tells the example, of each row of the steps."""
    return np.concatenate([batches[s]["targets"][..., 0] for s in steps], axis=-1)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])
        assert a[key].dtype == b[key].dtype


def test_a_batch_holds_padded_pairs():
    batch = TrainBatches(make(20), batch_size=8, seeds=0)[3]
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        "inputs": ((8, 6), "int32"),
        "targets": ((8, 3), "int32"),
    }
    for inputs, targets in zip(*batch.values(), strict=True):
        i = int(targets[0]) - 10
        n = 1 + i % 4
        assert inputs.tolist() == [i + 10] * n + [1] + [0] * (5 - n)
        assert targets.tolist() == [i + 10, 1, 0]


@pytest.mark.parametrize("number", [1, 2, 3, 7, 20, 33])
def test_every_epoch_holds_every_example_once(number):
    batches = TrainBatches(make(number), batch_size=8, seeds=5)
    stream = seen(batches, range(number)) - 10
    for epoch in range(8):
        part = stream[epoch * number : (epoch + 1) * number]
        assert sorted(part) == list(range(number))


def test_epochs_and_seeds_differ_in_order():
    stream = {
        seed: seen(TrainBatches(make(64), batch_size=8, seeds=seed), range(8 * 6)).reshape(6, 64)
        for seed in range(4)
    }
    orders = {tuple(epoch) for epochs in stream.values() for epoch in epochs}
    # Were the epoch added to the seed, seed 1 would repeat seed 0's second epoch.
    assert len(orders) == 4 * 6


def test_shuffling_moves_examples_all_over_the_epoch():
    batches = TrainBatches(make(1000), batch_size=100, seeds=0)
    where = np.argsort(seen(batches, range(10)))
    assert abs(np.corrcoef(where, np.arange(1000))[0, 1]) < 0.15
    assert np.abs(where - np.arange(1000)).mean() > 250  # 333 for a fair shuffle


def test_a_batch_is_a_function_of_seed_and_step():
    batches = TrainBatches(make(50), batch_size=8, seeds=3)
    expected = [batches[step] for step in range(40)]
    again = TrainBatches(make(50), batch_size=8, seeds=3)
    for step in np.random.default_rng(0).permutation(40):
        assert_same(again[step], expected[step])
    far = 10**9
    assert_same(again[far], TrainBatches(make(50), batch_size=8, seeds=3)[far])


def test_the_order_never_changes_between_versions():
    """A run that is resumed after an upgrade sees what it would have seen."""
    batches = TrainBatches(make(12), batch_size=6, seeds=0)
    assert (seen(batches, range(3)) - 10).tolist() == ORDER_OF_SEED_0


ORDER_OF_SEED_0 = [1, 5, 10, 3, 7, 2, 0, 4, 11, 9, 8, 6, 2, 5, 11, 4, 6, 8]


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("seeds", [0, (0, 4)])
def test_iterating_gives_what_indexing_gives(threads, seeds):
    batches = TrainBatches(make(50), batch_size=8, seeds=seeds)
    found = list(batches.iterate(5, 15, num_threads=threads))
    assert len(found) == 10
    for step, batch in enumerate(found, start=5):
        assert_same(batch, batches[step])
    assert list(batches.iterate(5, 5)) == []


def test_iteration_may_be_left_and_its_threads_go():
    before = threading.active_count()
    batches = TrainBatches(make(50), batch_size=8, seeds=0)
    for _ in range(3):
        iterator = batches.iterate(0, 10**9, num_threads=2)
        next(iterator)
        iterator.close()
        del iterator
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before


def test_the_order_of_a_seed_does_not_depend_on_its_neighbors():
    alone = TrainBatches(make(50), batch_size=8, seeds=7)
    for seeds in ((7,), (7, 8), (1, 7, 2), (7, 7)):
        together = TrainBatches(make(50), batch_size=8, seeds=seeds)
        for step in (0, 9, 100):
            assert together[step]["inputs"].shape == (len(seeds), 8, 6)
            for member in (i for i, seed in enumerate(seeds) if seed == 7):
                assert_same({k: v[member] for k, v in together[step].items()}, alone[step])


def test_mixtures_keep_their_rates_and_every_set_its_epochs():
    sets = [make(30, first=100), make(7, first=200)]
    batches = TrainBatches(sets, batch_size=8, seeds=0, rates=(3, 1))
    assert batches.examples_per_epoch == 37
    stream = seen(batches, range(24))
    first, second = stream[stream < 200], stream[stream >= 200]
    assert len(first) == 3 * len(second)
    for part, number, start in ((first, 30, 100), (second, 7, 200)):
        for epoch in range(len(part) // number):
            assert sorted(part[epoch * number : (epoch + 1) * number]) == list(
                range(start, start + number)
            )
    # Evenly interleaved: each batch has its share.
    assert ((stream.reshape(24, 8) < 200).sum(axis=1) == 6).all()
    equal = seen(TrainBatches(sets, batch_size=8, seeds=0), range(10))
    assert (equal < 200).sum() == 40


def test_a_mixture_says_which_set_an_example_is_of():
    sets = [make(30, first=100), make(7, first=200)]
    batches = TrainBatches(sets, batch_size=8, seeds=(0, 1))
    for step in range(5):
        batch = batches[step]
        assert batch["task_index"].shape == (2, 8) and batch["task_index"].dtype == np.int32
        of_second = batch["inputs"][..., 0] >= 200
        np.testing.assert_array_equal(batch["task_index"], of_second)
    some = TrainBatches(sets, batch_size=8, seeds=0, rows=np.asarray([1, 6]))
    one = TrainBatches(sets, batch_size=8, seeds=0)
    np.testing.assert_array_equal(some[3]["task_index"], one[3]["task_index"][[1, 6]])
    shapes = {name: array.shape for name, array in one.empty_batches(0, 3)[0].items()}
    assert shapes == {name: array.shape for name, array in one[0].items()}
    assert "task_index" not in TrainBatches(sets[0], batch_size=8, seeds=0)[0]


def test_the_inputs_of_a_mixture_belong_to_its_targets():
    batches = TrainBatches([make(30, first=100), make(7, first=200)], batch_size=8, seeds=(0, 1))
    batch = batches[4]
    np.testing.assert_array_equal(batch["inputs"][..., 0], batch["targets"][..., 0])


def test_indices_tell_which_examples_a_step_holds():
    batches = TrainBatches(make(50), batch_size=8, seeds=(3, 9))
    for member, seed in enumerate((3, 9)):
        targets = batches[6]["targets"][member, :, 0]
        np.testing.assert_array_equal(batches.indices_for(6, seed), targets - 10)


def test_a_plan_of_other_lengths_fits_the_seam():
    class Short(TrainBatches):
        def lengths_for(self, step):
            return (4, 2) if step % 2 else super().lengths_for(step)

    batches = Short(make(50), batch_size=8, seeds=(0, 1))
    assert [b["inputs"].shape for b in batches.iterate(0, 2)] == [
        (2, 8, 6),
        (2, 8, 4),
    ]
    assert batches[1]["targets"].shape == (2, 8, 2)


def test_negative_steps_and_bad_sizes():
    batches = TrainBatches(make(5), batch_size=2, seeds=0)
    with pytest.raises(IndexError):
        batches[-1]
    with pytest.raises(UserError, match=r"training\.batch_size is 0"):
        TrainBatches(make(5), batch_size=0, seeds=0)
    with pytest.raises(ValueError, match="differ in their lengths"):
        TrainBatches([make(5), make(5, inputs_length=7)], batch_size=2, seeds=0)
    with pytest.raises(ValueError, match="2 sets and 1 rates"):
        TrainBatches([make(5), make(5)], batch_size=2, seeds=0, rates=(1,))
    with pytest.raises(UserError, match=r"evaluation\.batch_size is 0"):
        list(eval_batches(make(5), batch_size=0))


@pytest.mark.parametrize("number", [1, 7, 8, 9, 16])
def test_evaluation_sees_every_example_once_and_in_order(number):
    batches = list(eval_batches(make(number), batch_size=8))
    assert len(batches) == -(-number // 8)
    rows = []
    for batch in batches:
        assert {len(array) for array in batch.values()} == {8}
        mask = batch["row_mask"]
        rows += batch["example_index"][mask].tolist()
        np.testing.assert_array_equal(batch["targets"][mask, 0], batch["example_index"][mask] + 10)
        assert (batch["example_index"][~mask] == -1).all()
        # Spare rows count in no sum over target tokens, and have inputs to attend to.
        assert not batch["targets"][~mask].any()
        assert (batch["inputs"][:, 0] > 0).all()
    assert rows == list(range(number))


def test_batches_come_faster_than_any_step(benchmark_set=50_000):
    rng = np.random.default_rng(0)
    inputs = make_ragged([np.full(n, 5) for n in rng.integers(20, 200, benchmark_set)])
    targets = make_ragged([[6, 1]] * benchmark_set)
    examples = TokenizedExamples(
        task=TASK,
        split="train",
        inputs=inputs,
        targets=targets,
        inputs_length=128,
        targets_length=8,
        load_texts=list,
    )
    batches = TrainBatches(examples, batch_size=32, seeds=0)
    rates = []
    for _ in range(3):
        start = time.process_time()  # whatever else the machine is doing
        for _ in batches.iterate(0, 100):
            pass
        rates.append(100 / (time.process_time() - start))
    # 1,500 a second on two cores; the bound leaves room for a slow one.
    assert max(rates) > 200


def test_an_empty_batch_of_each_shape_that_comes():
    buckets = Buckets.from_text("2,4,6", beside=0)
    batches = TrainBatches(make(40), batch_size=4, seeds=(0, 1), buckets=buckets)
    steps = range(40)
    shapes = {batches[step]["inputs"].shape for step in steps}
    empty = batches.empty_batches(0, 40)
    assert {batch["inputs"].shape for batch in empty} == shapes
    assert len(empty) == len(shapes) and not any(x.any() for b in empty for x in b.values())
    first = batches.empty_batches(0, 1)
    assert [{k: v.shape for k, v in b.items()} for b in first] == [
        {k: v.shape for k, v in batches[0].items()}
    ]
