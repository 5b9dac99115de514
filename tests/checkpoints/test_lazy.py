import numpy as np

from prompt_tuning_jax.checkpoints.lazy import LazyArray, in_memory

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
