"""Parameters by path: round trips, exact partitions, and messages that name both sides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.t5.model import T5
from tests.micro import T5_1_1, make_t5


def test_split_and_merge_round_trip():
    graphdef, params = param_tree.split(make_t5())
    merged = param_tree.merge(graphdef, params)
    _, again = param_tree.split(merged)
    assert again.keys() == params.keys()
    assert all(again[name] is params[name] for name in params)
    assert isinstance(merged, T5) and merged.config == T5_1_1
    # Equal models have equal structures: what is compiled for one serves the other.
    other, _ = param_tree.split(make_t5(seed=1))
    assert other == graphdef and hash(other) == hash(graphdef)


def test_names_and_paths_are_inverse():
    for path in [("encoder", "layers_0", "scale"), ("a", 3, "b"), ("x",)]:
        assert param_tree.path_tuple(param_tree.path_name(path)) == path


def test_fill_puts_values_in_and_keeps_the_axes():
    model = nnx.eval_shape(lambda: T5(T5_1_1, rngs=nnx.Rngs(0)))
    axes = param_tree.logical_axes(model)
    wanted = {
        n: jnp.full(p.shape, i, p.dtype)
        for i, (n, p) in enumerate(param_tree.split(model)[1].items())
    }
    param_tree.fill(model, wanted)
    for name, value in param_tree.split(model)[1].items():
        assert value is wanted[name]
    assert param_tree.logical_axes(model) == axes


def test_fill_lists_what_either_side_lacks_and_changes_nothing():
    model = make_t5()
    before = param_tree.split(model)[1]
    params = dict(before)
    params["decoder/extra"] = params.pop("decoder/decoder_norm/scale")
    with pytest.raises(UserError) as error:
        param_tree.fill(model, params)
    assert "only in the checkpoint: decoder/extra" in str(error.value)
    assert "only in the model: decoder/decoder_norm/scale" in str(error.value)
    wrong = {**before, "encoder/encoder_norm/scale": jnp.ones(17)}
    with pytest.raises(
        UserError, match=r"encoder_norm/scale is \(17,\) in the checkpoint and \(16,\)"
    ):
        param_tree.fill(model, wrong)
    assert all(p is before[name] for name, p in param_tree.split(model)[1].items())


def test_a_mask_partitions_exactly():
    params = dict(zip("abcd", range(4), strict=True))
    mask = {"a": True, "b": False, "c": True, "d": False}
    trainable, frozen = param_tree.partition(params, mask)
    assert (trainable, frozen) == ({"a": 0, "c": 2}, {"b": 1, "d": 3})
    for other in ({**mask, "e": True}, {"a": True}):
        with pytest.raises(UserError, match="the parameters and the mask do not match"):
            param_tree.partition(params, other)


def test_patterns_match_whole_paths():
    params = dict.fromkeys(["encoder/a/kernel", "encoder/a/kernel_2", "decoder/a/kernel"])
    assert list(param_tree.matching(params, r"encoder/.*/kernel").values()) == [True, False, False]
    assert set(param_tree.select(params, lambda name: name.endswith("l"))) == {
        "encoder/a/kernel",
        "decoder/a/kernel",
    }


def test_long_lists_of_names_are_cut_with_a_count():
    left = {f"p{i:02}": None for i in range(11)}
    with pytest.raises(UserError) as error:
        param_tree.require_same_names(left, {}, of="this", and_of="that")
    assert "p07 and 3 more" in str(error.value) and "p08" not in str(error.value)
    assert "only in that: nothing" in str(error.value)
    assert "\n" not in str(error.value)


def test_count_counts_numbers():
    shapes = {"a": np.zeros((2, 3)), "b": jax.ShapeDtypeStruct((4,), "float32"), "c": np.zeros(())}
    assert param_tree.count(shapes) == 11
