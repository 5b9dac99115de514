import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from prompt_tuning_jax.checkpoints.lazy_arrays import LazyArray, concatenated, in_memory
from prompt_tuning_jax.checkpoints.t5x.arrays import joined

ARRAY = np.arange(2 * 3 * 5, dtype=np.float32).reshape(2, 3, 5)


def parts(shape):
    """Some index of every kind: whole, beginning, middle, end."""
    yield tuple(slice(None) for _ in shape)
    yield tuple(slice(0, 1) for _ in shape)
    yield tuple(slice(1, size) for size in shape)
    yield tuple(slice(size // 2, None) for size in shape)


def test_parts_of_a_transposed_array_and_of_a_layer_are_those_of_the_whole():
    lazy = in_memory(ARRAY, where="here")
    cases = [(lazy, ARRAY), (lazy.transposed(), ARRAY.T)]
    for axis in range(3):
        for number in range(ARRAY.shape[axis]):
            cases.append((lazy.layer(number, axis=axis), ARRAY.take(number, axis)))
            cases.append((lazy.layer(number, axis=axis).transposed(), ARRAY.take(number, axis).T))
    for got, want in cases:
        assert got.shape == want.shape and got.dtype == want.dtype and got.where == "here"
        np.testing.assert_array_equal(got.whole(), want)
        for index in parts(want.shape):
            np.testing.assert_array_equal(got.read(index), want[index])


def test_a_view_reads_no_more_than_its_part():
    asked = []

    def read(index):
        asked.append(index)
        return ARRAY[index]

    lazy = LazyArray(shape=ARRAY.shape, dtype=ARRAY.dtype, where="", read=read)
    lazy.layer(1, axis=1).transposed().read((slice(2, 4), slice(0, 1)))
    assert asked == [(slice(0, 1), slice(1, 2), slice(2, 4))]


@settings(max_examples=100, deadline=None)
@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=4), data=st.data())
def test_any_views_of_views_read_what_numpy_reads(shape, data):
    whole = np.arange(np.prod(shape)).reshape(shape)
    lazy = in_memory(whole, where="")
    for _ in range(data.draw(st.integers(0, 3), label="views")):
        kinds = ["transposed", *["layer", "joined"] * (whole.ndim > 1)]
        kind = data.draw(st.sampled_from(kinds))
        if kind == "transposed":
            lazy, whole = lazy.transposed(), whole.T
        elif kind == "layer":
            axis = data.draw(st.integers(0, whole.ndim - 1), label="axis")
            number = data.draw(st.integers(0, whole.shape[axis] - 1), label="number")
            lazy, whole = lazy.layer(number, axis=axis), whole.take(number, axis)
        else:
            axis = data.draw(st.integers(0, whole.ndim - 2), label="axis")
            lazy = joined(lazy, axis=axis)
            whole = whole.reshape(*whole.shape[:axis], -1, *whole.shape[axis + 2 :])
    assert lazy.shape == whole.shape
    np.testing.assert_array_equal(lazy.whole(), whole)
    bounds = [data.draw(st.tuples(st.integers(0, n), st.integers(0, n + 2))) for n in whole.shape]
    index = tuple(slice(start, stop) for start, stop in bounds)
    np.testing.assert_array_equal(lazy.read(index), whole[index])


@given(st.data())
def test_taken_entries_and_joined_arrays_are_those_of_numpy(data):
    axis = data.draw(st.integers(0, 2))
    other = in_memory(ARRAY[::-1] + 100, where="there")
    lazy = concatenated([in_memory(ARRAY, where="here"), other], axis=axis)
    want = np.concatenate([ARRAY, ARRAY[::-1] + 100], axis)
    size = want.shape[axis]
    order = np.array(data.draw(st.permutations(range(size)))[: data.draw(st.integers(1, size))])
    for got, array in ((lazy, want), (lazy.taken(order, axis=axis), want.take(order, axis))):
        assert got.shape == array.shape and got.dtype == array.dtype
        ends = [st.lists(st.integers(0, n), min_size=2, max_size=2) for n in array.shape]
        index = tuple(slice(*sorted(data.draw(each))) for each in ends)
        np.testing.assert_array_equal(got.whole(), array)
        np.testing.assert_array_equal(got.read(index), array[index])


def test_taken_entries_are_read_in_runs():
    """Heads of a fused array: what is between them is not read, and neighbors are read at once."""
    asked = []

    def read(index):
        asked.append(index[0])
        return ARRAY.reshape(30)[index]

    lazy = LazyArray(shape=(30,), dtype=ARRAY.dtype, where="", read=read)
    query = lazy.taken(np.array([0, 1, 2, 9, 10, 11, 18, 19, 20]), axis=0)
    np.testing.assert_array_equal(query.read((slice(2, 6),)), [2, 9, 10, 11])
    assert asked == [slice(2, 3), slice(9, 12)]
    asked.clear()
    pairs = lazy.taken(np.array([4, 6, 5, 7]), axis=0)
    np.testing.assert_array_equal(pairs.whole(), [4, 6, 5, 7])
    assert asked == [slice(4, 8)]
